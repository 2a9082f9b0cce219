"""Which hosts and addresses this server may talk to on behalf of a caller.

Holds the URL grammar (``parse_url``), the judgement on an IP address (``AddressPolicy``) and the
error both raise (``FetchError``). Resolves nothing and connects to nothing:
``redux_server.net.client`` does.

The tables are written out instead of asking ``ipaddress.is_global``, whose answer changed between
Python releases. Source: the IANA special-purpose address registries (RFC 6890 and its updates).
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal, Self
from urllib.parse import quote, urlsplit

import idna

from redux_server.net import own_addresses

# fmt: off
Reason = Literal[
    "scheme", "host", "address", "port", "dns", "connect", "redirect", "timeout", "too_large",
    "status", "encoding", "tls",
]
# fmt: on
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL_LENGTH = 8192
DEFAULT_PORTS = {"http": 80, "https": 443}

_FORBIDDEN_V4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier NAT; some clouds keep their metadata here
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's platform endpoint, reachable from every Azure machine
        "169.254.0.0/16",  # link-local, cloud metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT relays
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# Everything outside 2000::/3 is refused too: loopback, mapped and compatible IPv4, NAT64 with a
# local prefix, unique local, link-local, site-local, multicast and what is not assigned yet.
_GLOBAL_V6 = IPv6Network("2000::/3")
_FORBIDDEN_V6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, carries any IPv4 address
        "3ffe::/16",  # the former 6bone
        "3fff::/20",  # documentation
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)"
    r"(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?:#.*)?"
)
_ANY_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,19}):")
_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(?::(?P<port>[0-9]{0,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")
_ENTRY = re.compile(r"(?:\[(?P<inner>[^\[\]]+)\]|(?P<name>[^\[\]:]+))(?::(?P<port>\*|[0-9]{1,5}))?")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
_TO_ENCODE = re.compile(r"[^!#-;=?-_a-z~]|\^")  # as browsers do, in a path or a query
# Client libraries repeat a failed request when its error text holds one of these.
_RETRY_WORDS = re.compile(r"timeout|connection|http (?:5|429)", re.IGNORECASE)


class FetchError(Exception):
    """A URL that was not fetched.

    ``reason`` is a slug for a metric; ``public_message`` is fit for the caller: it names the host
    at most, never the path or the query, and holds no word on which client libraries retry.
    """

    def __init__(self, reason: Reason, public_message: str) -> None:
        super().__init__(public_message)
        self.reason: Reason = reason
        self.public_message = public_message


def quoted(name: str) -> str:
    """Write a caller's host or scheme for a public message: ASCII, short, without retry words."""
    shown = ascii(name if len(name) <= 80 else f"{name[:77]}...")
    return "(name withheld)" if _RETRY_WORDS.search(shown) else shown


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart. ``host`` is lower case, without brackets or a trailing dot."""

    scheme: str
    host: str
    port: int
    path_and_query: str

    @property
    def host_header(self) -> str:
        """The value of the Host header: brackets around IPv6, the port where it is not usual."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole URL in its normal form. Holds the query: not for messages or logs."""
        return f"{self.scheme}://{self.host_header}{self.path_and_query}"


def is_http_url(url: str) -> bool:
    """Whether an operator's own URL of a server can be one; nothing else of it is judged."""
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in DEFAULT_PORTS
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        return False


def parse_url(url: str) -> Target:
    """Take an http or https URL apart, strictly by RFC 3986.

    Spaces and whatever else has to be are percent-encoded in the path and the query, and
    international names become those that are looked up (``xn--``). Forms that other parsers read
    as something else are refused instead of repaired: user names, control characters, backslashes,
    percent-encoded hosts, letters that are another way to write ASCII, and every way to write an
    IPv4 address except four decimal numbers.

    Raises:
        FetchError: ``scheme`` or ``host``.
    """
    if len(url) > MAX_URL_LENGTH:
        raise FetchError(
            "host", f"The URL has {len(url)} characters; at most {MAX_URL_LENGTH} are accepted."
        )
    if _UNSAFE.search(url) or url != url.strip():
        raise FetchError(
            "host",
            "The URL holds a control character or a backslash, or a blank at an end. "
            "Percent-encode these, or leave them out.",
        )
    match = _URL.fullmatch(url)
    scheme = match["scheme"].lower() if match else ""
    if match is None or scheme not in DEFAULT_PORTS:
        raise FetchError("scheme", _scheme_message(url))
    host, port = _split_authority(match["authority"])
    return Target(
        scheme=scheme,
        host=_normal_host(host),
        port=_port_number(port, host, DEFAULT_PORTS[scheme]),
        path_and_query=_ascii_only((match["path"] or "/") + (match["query"] or "")),
    )


def _scheme_message(url: str) -> str:
    match = _ANY_SCHEME.match(url)
    given = f"starts with {quoted(match[1] + ':')}" if match else "has no scheme"
    return f"The URL {given}; only URLs that start with http:// or https:// are fetched."


def _ascii_only(text: str) -> str:
    try:
        return _TO_ENCODE.sub(lambda match: quote(match[0], safe=""), text)
    except UnicodeEncodeError:
        raise FetchError("host", "The URL holds characters that are not valid Unicode.") from None


def _split_authority(authority: str) -> tuple[str, str]:
    if "@" in authority:
        raise FetchError(
            "host", "The URL holds a user name or a password; only plain http(s) URLs are fetched."
        )
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise FetchError("host", f"The URL's host {quoted(authority)} is not host or host:port.")
    return match["host"], match["port"] or ""


def _port_number(text: str, host: str, default: int) -> int:
    port = int(text) if text else default
    if not 1 <= port <= 65535:
        raise FetchError("host", f"The port after host {quoted(host)} must be 1 to 65535.")
    return port


def _normal_host(raw: str) -> str:
    if raw.startswith("["):
        return _ipv6_literal(raw)
    host = (raw if raw.isascii() else _international(raw)).lower().removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise FetchError(
            "host",
            f"The URL's host {quoted(raw)} is not a host name. Names of letters, digits and "
            "hyphens are accepted, international ones by the rules of IDNA 2008.",
        )
    return _ipv4_literal(host) if _NUMERIC_LABEL.fullmatch(labels[-1]) else host


def _international(raw: str) -> str:
    """A name with other letters than ASCII's as it is looked up, or "" for none that may be.

    IDNA 2008 without the mappings that browsers put before it: a letter that would be mapped to
    ASCII is no letter of a name here, so nothing reads as an address, or as another host.
    """
    name = unicodedata.normalize("NFC", raw).lower()
    try:
        found = idna.encode(name, strict=True).decode()
    except UnicodeError:  # idna's errors are such
        return ""
    return found if "xn--" in found else ""


def _ipv4_literal(host: str) -> str:
    try:
        return str(IPv4Address(host))
    except ValueError:
        raise FetchError(
            "host",
            f"The URL's host {quoted(host)} is not a usable address: write IPv4 addresses as four "
            "decimal numbers without leading zeros.",
        ) from None


def _ipv6_literal(raw: str) -> str:
    try:
        address = IPv6Address(raw[1:-1])
    except ValueError:
        raise FetchError("host", f"The URL's host {quoted(raw)} is not an IPv6 address.") from None
    if address.scope_id is not None:
        raise FetchError(
            "host", f"The URL's host {quoted(raw)} names a network interface; none is accepted."
        )
    return str(address)


@dataclass(frozen=True, slots=True)
class Opening:
    """What the operator allowed: a host, by name or address, or a network, at some ports.

    ``place`` is a name in lower case, a canonical address or a network. No ``ports`` are all.
    """

    place: str | Network
    ports: frozenset[int] = frozenset(DEFAULT_PORTS.values())

    @classmethod
    def parse(cls, entry: str) -> Self:
        """From ``minio``, ``minio:9000``, ``minio:*``, ``10.0.0.0/8``, ``[fd00::/8]:9000``.

        Without a port it is those of http and https.

        Raises:
            ValueError: an entry is none of these; the text names it.
        """
        match = _ENTRY.fullmatch(entry)
        name, inner, port = match.group("name", "inner", "port") if match else (None, entry, None)
        place = _allowed_place(name or inner, is_name=name is not None, entry=entry)
        if port is None:
            return cls(place)
        if port != "*" and not 1 <= int(port) <= 65535:
            raise ValueError(f"{entry!r} has a port that is not 1 to 65535")
        return cls(place, frozenset(() if port == "*" else (int(port),)))

    def is_at(self, port: int) -> bool:
        """Whether ``port`` is open."""
        return not self.ports or port in self.ports

    def holds(self, host: str, address: Address | None) -> bool:
        """Whether it is ``host`` by name, or holds ``address``."""
        if isinstance(self.place, str):
            return self.place == host
        return address is not None and address in self.place


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """Judges addresses: globally routable unicast ones of others, and what the operator allowed.

    Whatever address a name that is allowed has is accepted; networks are accepted under any name.
    ``is_own`` says which addresses are this machine's: packets to them never leave it, so that they
    pass firewalls which shield its ports.
    """

    openings: tuple[Opening, ...] = ()
    is_own: Callable[[Address], bool] = own_addresses.is_own

    @classmethod
    def from_entries(cls, entries: Iterable[str]) -> Self:
        """Build a policy from what ``Opening.parse`` takes, and raise what it does."""
        return cls(tuple(map(Opening.parse, entries)))

    def allows(self, host: str, address: Address, port: int) -> bool:
        """Whether ``address``, found under the name ``host``, may be connected to at ``port``."""
        return self.opens(host, address, port) or self._is_public(host, address, port)

    def opens(self, host: str, address: Address | None, port: int) -> bool:
        """Whether the operator allowed it, be it public or not."""
        return any(each.is_at(port) for each in self._openings_of(host, address))

    def _openings_of(self, host: str, address: Address | None) -> Iterator[Opening]:
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            address = None  # an interface of this machine: in no network
        return (each for each in self.openings if each.holds(host, address))

    def _is_public(self, host: str, address: Address, port: int) -> bool:
        if isinstance(address, IPv4Address):
            is_global = not any(address in network for network in _FORBIDDEN_V4)
        elif address.scope_id is not None:
            return False
        elif address in _NAT64:  # the packet ends at the IPv4 address inside: judge that one
            return self.allows(host, IPv4Address(int(address) & 0xFFFFFFFF), port)
        else:
            is_global = address in _GLOBAL_V6 and not any(
                address in network for network in _FORBIDDEN_V6
            )
        return is_global and not self.is_own(address)

    def check(self, host: str, addresses: Iterable[str], port: int) -> list[str]:
        """Return the addresses of ``host`` in canonical form, if every one of them is allowed.

        One forbidden address refuses them all: a public name with a private address beside a
        public one is a rebinding attempt, and choosing the public one would only hide it.

        Raises:
            FetchError: ``dns`` for no or malformed addresses, ``address`` for a forbidden one,
                ``port`` where only others are allowed.
        """
        try:
            parsed = [ip_address(text) for text in addresses]
        except ValueError:
            parsed = []
        if not parsed:
            raise FetchError("dns", f"The host {quoted(host)} has no usable address.")
        for address in parsed:
            if not self.allows(host, address, port):
                raise self._forbidden(host, address, port)
        return [str(address) for address in parsed]

    def _forbidden(self, host: str, address: Address, port: int) -> FetchError:
        if any(self._openings_of(host, address)):
            return FetchError(
                "port",
                f"The host {quoted(host)} may be reached, but not at port {port}, which the "
                "operator has not allowed.",
            )
        return FetchError(
            "address",
            f"The host {quoted(host)} is not on the public internet (its address is loopback, "
            "private, link-local, reserved, or this server's own); only public addresses are "
            "fetched from.",
        )


def _allowed_place(place: str, *, is_name: bool, entry: str) -> str | Network:
    with suppress(ValueError):
        return ip_network(place)
    with suppress(FetchError):
        if is_name:
            return _normal_host(place)
    raise ValueError(
        f"{entry!r} is neither a host name nor an address nor a network (like 10.0.0.0/8 with "
        "no bits set after the prefix), each with or without a port (minio:9000, minio:*)"
    )
