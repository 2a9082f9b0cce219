"""One HTTP exchange with a host that a caller named, by the rules of ``redux_server.net.guard``.

``GuardedClient`` is what fetching a picture and calling a webhook have in common: fresh sockets,
one request, no redirect followed, and every fault of the network as a ``FetchError``. Below it, for
use under ``httpcore``: a deadline over everything, a resolver that may be abandoned, and a network
backend which resolves once, checks every address and connects to exactly one of these. Knows
nothing of what is sent or received.
"""

import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import httpcore

from redux_server.net.guard import AddressPolicy, FetchError, Target, quoted

Clock = Callable[[], float]
Resolver = Callable[[str, int], Sequence[str]]
"""``(host, port)`` to IP addresses; raises ``OSError`` for an unknown name."""
Connector = Callable[[str, int, float], httpcore.NetworkStream]
"""``(ip_address, port, timeout_s)`` to a stream; raises ``httpcore.ConnectError``."""
MAX_LOOKUPS = 32
MAX_ADDRESSES_TRIED = 3


class Deadline:
    """A point in time that a whole fetch must not pass."""

    def __init__(self, limit_s: float, clock: Clock = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._ends_at = clock() + limit_s

    def remaining_s(self) -> float:
        """Seconds left, more than 0.

        Raises:
            FetchError: ``timeout``, if none are left.
        """
        remaining_s = self._ends_at - self._clock()
        if remaining_s <= 0:
            raise self.error()
        return remaining_s

    def error(self) -> FetchError:
        """The error of a fetch that met this deadline."""
        return FetchError("timeout", f"Fetching the URL took longer than {self._limit_s:g} s.")


def resolve(host: str, port: int) -> list[str]:
    """Ask the system for the addresses of ``host``, in the order of preference (RFC 6724)."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def connect(address: str, port: int, timeout_s: float) -> httpcore.NetworkStream:
    """Open a TCP stream to an IP address."""
    return httpcore.SyncBackend().connect_tcp(address, port, timeout_s)


class BoundedLookup:
    """Runs a resolver that cannot be interrupted, and leaves it behind at the deadline.

    At most ``MAX_LOOKUPS`` run at once, so that a dead name server cannot pile up threads.
    """

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._slots = threading.BoundedSemaphore(MAX_LOOKUPS)

    def __call__(self, host: str, port: int, deadline: Deadline) -> Sequence[str]:
        """Resolve ``host``; raises ``FetchError`` with ``dns`` or ``timeout``."""
        answers: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()
        if not self._slots.acquire(timeout=deadline.remaining_s()):
            raise deadline.error()
        thread = threading.Thread(
            target=self._run, args=(host, port, answers), name="fetch-dns", daemon=True
        )
        thread.start()
        try:
            answer = answers.get(timeout=deadline.remaining_s())
        except queue.Empty:
            raise deadline.error() from None
        if isinstance(answer, socket.gaierror) and answer.errno == socket.EAI_AGAIN:
            raise FetchError(
                "dns",
                f"The host {quoted(host)} could not be looked up: the name server that this server "
                "asks does not answer.",
            ) from answer
        if isinstance(answer, (OSError, UnicodeError)):
            raise FetchError("dns", f"The host {quoted(host)} was not found.") from answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _run(
        self, host: str, port: int, answers: "queue.SimpleQueue[Sequence[str] | Exception]"
    ) -> None:
        try:
            answers.put(self._resolver(host, port))
        except Exception as error:
            answers.put(error)
        finally:
            self._slots.release()


class GuardedStream(httpcore.NetworkStream):
    """A stream whose every operation ends by the deadline, and that reads a bounded total."""

    def __init__(
        self, stream: httpcore.NetworkStream, deadline: Deadline, max_wire_bytes: int
    ) -> None:
        self._stream = stream
        self._deadline = deadline
        self._wire_bytes_left = max_wire_bytes

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read up to ``max_bytes``; ``timeout`` gives way to the deadline."""
        data = self._stream.read(max_bytes, self._deadline.remaining_s())
        self._wire_bytes_left -= len(data)
        if self._wire_bytes_left < 0:
            raise FetchError("too_large", "The host sent far more bytes than a picture may have.")
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write all of ``buffer``; ``timeout`` gives way to the deadline."""
        self._stream.write(buffer, self._deadline.remaining_s())

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        """Start TLS with the name of the URL, not with the address connected to."""
        try:
            stream = self._stream.start_tls(
                ssl_context, server_hostname, self._deadline.remaining_s()
            )
        except httpcore.ConnectError as error:
            host = quoted(server_hostname or "")
            raise FetchError(
                "tls", f"The host {host} offers no TLS session with a valid certificate."
            ) from error
        return GuardedStream(stream, self._deadline, self._wire_bytes_left)

    def get_extra_info(self, info: str) -> Any:
        """What the stream below knows under ``info``."""
        return self._stream.get_extra_info(info)


class GuardedBackend(httpcore.NetworkBackend):
    """Resolves a host once, checks every address, and connects to exactly one of these."""

    def __init__(
        self,
        *,
        policy: AddressPolicy,
        lookup: BoundedLookup,
        connector: Connector,
        deadline: Deadline,
        max_wire_bytes: int,
    ) -> None:
        self._policy = policy
        self._lookup = lookup
        self._connector = connector
        self._deadline = deadline
        self._max_wire_bytes = max_wire_bytes

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to ``host``; ``timeout`` gives way to the deadline.

        Raises:
            FetchError: ``dns``, ``address``, ``port``, ``connect`` or ``timeout``.
        """
        addresses = self._checked_addresses(host, port)[:MAX_ADDRESSES_TRIED]
        failure: Exception | None = None
        for tried, address in enumerate(addresses):
            share_s = self._deadline.remaining_s() / (len(addresses) - tried)
            try:
                stream = self._connector(address, port, share_s)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return GuardedStream(stream, self._deadline, self._max_wire_bytes)
        self._deadline.remaining_s()
        raise FetchError("connect", f"The host {quoted(host)} could not be reached.") from failure

    def _checked_addresses(self, host: str, port: int) -> list[str]:
        literal = ":" in host or host.rpartition(".")[2].isdigit()  # as parse_url leaves them
        answers = [host] if literal else self._lookup(host, port, self._deadline)
        return self._policy.check(host, answers, port)


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
