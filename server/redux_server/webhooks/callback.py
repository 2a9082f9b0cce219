"""Where a task's webhook goes: what a caller may name, and how it is kept.

Resolves nothing: a name is judged again, with its address, at each delivery.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Self

from redux_server.errors import BadRequest
from redux_server.net.guard import AddressPolicy, FetchError, Target, parse_url, quoted

# The hosted service's own words, which clients may compare.
NO_BASE64 = (
    "webhook callback does not support base64 output, please use the normal API to use base64 "
    "output"
)


@dataclass(frozen=True, slots=True)
class Callback:
    """A receiver's URL in its normal form, and the base of the URLs that it will be told.

    The two are kept as one text, ``URL#BASE``: a fragment is never sent to a server (RFC 9110,
    section 7.1), so its place is free, and one column travels from the task to the outbox.
    """

    url: str
    base_url: str

    def stored(self) -> str:
        """The text that ``parse`` reads."""
        return f"{self.url}#{self.base_url}"

    @classmethod
    def parse(cls, stored: str) -> Self:
        """What ``stored`` wrote."""
        url, _, base_url = stored.partition("#")
        return cls(url, base_url)

    @property
    def origin(self) -> str:
        """Scheme, host and port: all of the URL that is fit for a log."""
        return self.url[: self.url.index("/", self.url.index("://") + 3)]


def one_webhook(given: Iterable[str | None]) -> str:
    """The URL that was given in one place or in several; ``""`` for none.

    Raises:
        BadRequest: there are different ones.
    """
    urls = list(dict.fromkeys(url for url in given if url))
    if len(urls) > 1:
        raise BadRequest(
            f"webhook was given {len(urls)} times with different URLs; a task has one. Give it as "
            "the query parameter webhook, or as webhook_url in the body."
        )
    return urls[0] if urls else ""


def check_webhook(url: str, policy: AddressPolicy) -> str:
    """The normal form of a receiver's URL.

    https is asked for, unless ``policy`` names the host or holds its literal address.

    Raises:
        BadRequest: not a URL that would ever be called.
    """
    try:
        target = parse_url(url)
        if _is_literal(target.host):
            policy.check(target.host, [target.host], target.port)
    except FetchError as error:
        raise BadRequest(f"webhook cannot be used. {_explain(error)}") from None
    if target.scheme != "https" and not _is_allowed_by_name(target, policy):
        raise BadRequest(
            f"webhook must start with https://, got http:// for host {quoted(target.host)}. Plain "
            "http is only for hosts and ports that the operator allows with --webhook-allow."
        )
    return target.url


def _explain(error: FetchError) -> str:
    if error.reason == "scheme":
        return "It must be a complete URL that starts with https://."
    if error.reason == "address":
        return (
            "Its address is loopback, private, link-local, reserved or this server's own; only "
            "public addresses are called, and the hosts and ports that the operator allows with "
            "--webhook-allow."
        )
    if error.reason == "port":
        return f"{error.public_message} Let the operator allow this port with --webhook-allow."
    return error.public_message


def _is_literal(host: str) -> bool:
    return ":" in host or host.rpartition(".")[2].isdigit()  # as parse_url leaves them


def _is_allowed_by_name(target: Target, policy: AddressPolicy) -> bool:
    address = ip_address(target.host) if _is_literal(target.host) else None
    return policy.opens(target.host, address, target.port)
