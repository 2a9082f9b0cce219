"""What a request is addressed to: its path as it was meant, and the host that its client called.

Clients join addresses from pieces, and proxies take requests under names of their own. Stands
around everything else, so that nothing else has to know. Believes only proxies that the operator
named.
"""

import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from starlette.types import ASGIApp, Receive, Scope, Send

_API = ("/api/", "/center/")
_SLASHES = re.compile(r"/{2,}")
# A base URL that ends in /api/v3 (or /api), to which a client adds /api/v3 again.
_BASE_AGAIN = re.compile(r"/(?:api/(?:v\d/)?)+(?=api/v\d/)")
_HOST = re.compile(r"(?:[\w.~-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?", re.ASCII)
_HAS_PORT = re.compile(r":\d+$")
_PREFIX = re.compile(r"(?:/[\w.~-]{1,64}){1,8}", re.ASCII)
_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}
_USUAL_PORTS = ("80", "443")
# One parameter of a Forwarded element (RFC 7239): a token, "=", and a token or a quoted string.
_PARAMETER = re.compile(r'\s*([\w!#$%&\'*+.^`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;,"]*))\s*')
_MAX_FORWARDED = 4096


class TargetUri:
    """Sets ``path``, ``scheme``, ``root_path`` and the Host header of each request.

    ``proxies`` are those whose ``X-Forwarded-*`` and ``Forwarded`` are believed.
    """

    def __init__(self, app: ASGIApp, *, proxies: "TrustedProxies") -> None:
        self._app = app
        self._proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] == "http":
            scope["path"] = meant_path(scope["path"])
            if scope["client"] and scope["client"][0] in self._proxies:
                _apply(scope, said_by_proxies(scope["headers"]))
        await self._app(scope, receive, send)


def meant_path(path: str) -> str:
    """``path`` without doubled slashes, and without a base that a client added twice.

    In the API, without a slash at its end too.
    """
    if "//" in path:
        path = _SLASHES.sub("/", path)
    if match := _BASE_AGAIN.match(path):
        path = path[match.end() - 1 :]
    return path.rstrip("/") if path.startswith(_API) else path


class TrustedProxies:
    """Addresses and networks of proxies, as ``--trusted-proxies`` has them; ``*`` is all.

    Raises:
        ValueError: an entry is neither; the text names it.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self._is_all = False
        self._networks: list[IPv4Network | IPv6Network] = []
        for entry in entries:
            if entry == "*":
                self._is_all = True
                continue
            try:
                self._networks.append(ip_network(entry))
            except ValueError:
                raise ValueError(
                    f"{entry!r} is neither an address nor a network (like 10.0.0.0/8 with no bits "
                    "set after the prefix) nor *"
                ) from None

    def __contains__(self, host: str) -> bool:
        """Whether the peer ``host`` is one of them."""
        if self._is_all:
            return True
        try:
            address = ip_address(host)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)  # on a socket for both families
        return any((mapped or address) in network for network in self._networks)


def said_by_proxies(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """``proto``, ``host``, ``port`` and ``prefix`` of the outermost proxy, as far as it said them.

    Of a list the first counts: each proxy appends to what it was told. ``X-Forwarded-*`` go before
    ``Forwarded``, which many proxies pass on as a client sent it.
    """
    texts: dict[str, str] = {}
    for name, value in headers:
        if b"forwarded" in name:
            text = value[:_MAX_FORWARDED].decode("latin-1")
            key = name.decode("latin-1")
            texts[key] = f"{texts[key]}, {text}" if key in texts else text
    said = _first_element(texts.get("forwarded", ""))
    for key in ("proto", "host", "port", "prefix"):
        first = texts.get(f"x-forwarded-{key}", "").partition(",")[0].strip().strip('"')
        if first:
            said[key] = first
    return said


def _first_element(forwarded: str) -> dict[str, str]:
    """The parameters of the first element of a Forwarded header, as far as they are well formed."""
    found: dict[str, str] = {}
    at = 0
    while match := _PARAMETER.match(forwarded, at):
        quoted_text, token = match[2], match[3]
        value = token if quoted_text is None else re.sub(r"\\(.)", r"\1", quoted_text)
        found.setdefault(match[1].lower(), value)
        if forwarded[match.end() : match.end() + 1] != ";":
            break
        at = match.end() + 1
    return {key: found[key] for key in ("proto", "host") if found.get(key)}


def _apply(scope: Scope, said: Mapping[str, str]) -> None:
    scheme = _SCHEMES.get(said.get("proto", "").lower())
    if scheme:
        scope["scheme"] = scheme
    prefix = said.get("prefix", "").rstrip("/")
    if _PREFIX.fullmatch(prefix):
        scope["root_path"] = prefix
    given = next((v.decode("latin-1") for n, v in scope["headers"] if n == b"host"), "")
    host = said.get("host", "")
    host = host if _HOST.fullmatch(host) else given
    port = said.get("port", "")
    is_told = port.isdecimal() and port not in _USUAL_PORTS and 0 < int(port[:6]) < 2**16
    if is_told and _HOST.fullmatch(host) and not _HAS_PORT.search(host):
        host = f"{host}:{port}"
    if host != given:
        others = [header for header in scope["headers"] if header[0] != b"host"]
        scope["headers"] = [(b"host", host.encode("latin-1")), *others]
