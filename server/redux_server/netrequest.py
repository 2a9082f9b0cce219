"""One HTTP exchange over the guarded sockets of ``redux_server.netbackend``.

Holds what fetching a picture and calling a webhook have in common: fresh sockets, one request, no
redirect followed, and every fault of the network as a ``FetchError``. Knows nothing of what is
sent or received.
"""

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import httpcore

from redux_server.netbackend import BoundedLookup, Connector, Deadline, GuardedBackend, Resolver
from redux_server.netguard import AddressPolicy, FetchError, Target, quoted


class GuardedClient:
    """Makes single requests to hosts that ``policy`` allows. Safe to share among threads."""

    def __init__(self, policy: AddressPolicy, *, resolver: Resolver, connector: Connector) -> None:
        self._policy = policy
        self._lookup = BoundedLookup(resolver)
        self._connector = connector

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    @contextmanager
    def request(
        self,
        method: str,
        target: Target,
        *,
        headers: Mapping[str, str],
        deadline: Deadline,
        max_wire_bytes: int,
        content: bytes | None = None,
    ) -> Iterator[httpcore.Response]:
        """The answer to one request; its body is not read yet, its sockets close at the end.

        Host and ``Connection: close`` are sent beside ``headers``; ``max_wire_bytes`` bounds all
        that is read, headers and framing included.

        Raises:
            FetchError: for every reason that lies with the host or the network, also from within
                the ``with`` block.
        """
        backend = GuardedBackend(
            policy=self._policy,
            lookup=self._lookup,
            connector=self._connector,
            deadline=deadline,
            max_wire_bytes=max_wire_bytes,
        )
        pool = httpcore.ConnectionPool(
            ssl_context=self._ssl_context if target.scheme == "https" else None,
            max_connections=1,
            max_keepalive_connections=0,
            network_backend=backend,
        )
        all_headers: list[tuple[bytes | str, bytes | str]] = [
            ("Host", target.host_header),
            *headers.items(),
            ("Connection", "close"),
        ]
        with (
            _public_errors(target, deadline),
            pool,
            pool.stream(method, _wire_url(target), headers=all_headers, content=content) as answer,
        ):
            yield answer


def _wire_url(target: Target) -> httpcore.URL:
    return httpcore.URL(
        scheme=target.scheme.encode(),
        host=target.host.encode(),
        port=target.port,
        target=target.path_and_query.encode(),
    )


@contextmanager
def _public_errors(target: Target, deadline: Deadline) -> Iterator[None]:
    """Turn what httpcore raises into ``FetchError``."""
    try:
        yield
    except httpcore.TimeoutException as error:
        raise deadline.error() from error
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise FetchError(
            "connect",
            f"The host {quoted(target.host)} broke off, or did not answer as a web server should.",
        ) from error
