"""What surrounds every request: an id, a log line, a limit on its body, headers for browsers.

Plain ASGI, and nothing is buffered. Knows paths only by how they begin. Keys are the business of
``redux_server.api.auth``.
"""

import asyncio
import base64
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterable
from urllib.parse import quote

import structlog
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redux_server import metrics
from redux_server.errors import TooLarge, TooSlow, error_response

PATIENCE_S = 20.0
SLOWEST_BYTES_PER_S = 32 * 2**10
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_LOGGED_PATH = 512
_SIGNED = ("/files/", "/uploads/")
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")

ANY, NONE = "*", "none"
EXPOSED = (
    *("X-Request-Id", "Retry-After", "Idempotent-Replayed", "Workers-Ready"),
    *("Content-Range", "ETag"),
)
PREFLIGHT_KEPT_S = 7200  # as long as any browser keeps it
_CORS_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
_OPEN = ("/api/", "/files/")

# Source: OWASP's Secure Headers Project and REST Security Cheat Sheet.
Header = tuple[bytes, bytes]
_ALWAYS: tuple[Header, ...] = ((b"x-content-type-options", b"nosniff"),)
_NO_STORE: Header = (b"cache-control", b"no-store")
_PAGE: tuple[Header, ...] = (
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
_POLICY = (
    "default-src 'self'; script-src {scripts}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
# A stored picture that is opened as a page of its own may do nothing at all.
_FILE: tuple[Header, ...] = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; sandbox"),
    (b"referrer-policy", b"no-referrer"),
)

_log = structlog.get_logger("redux_server.api.middleware")


class RequestContext:
    """Gives each request an id (or keeps the client's), measures it and logs its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _given_id(scope) or secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)
        status = 500
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    *security_headers(scope["path"], message["headers"]),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _record(scope, status, time.perf_counter() - started)
            structlog.contextvars.unbind_contextvars("request_id")


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            return text if _REQUEST_ID.fullmatch(text) else None
    return None


def _record(scope: Scope, status: int, seconds: float) -> None:
    route = getattr(scope.get("route"), "path", None)  # FastAPI's; Starlette's leave a function
    route = route or getattr(scope.get("endpoint"), "__name__", "unmatched")
    method = scope["method"] if scope["method"] in _METHODS else "other"  # a stranger's choice
    metrics.HTTP.labels(method, route, str(status)).observe(seconds)
    # Polls and preflights are many and say nothing; the query string is never logged, it may hold a
    # secret.
    is_dull = scope["method"] in ("GET", "OPTIONS") and status < 400
    report = _log.debug if is_dull else _log.info
    report(
        "request",
        method=scope["method"],
        path=loggable(scope["path"]),
        status=status,
        duration_ms=round(seconds * 1000, 1),
    )


def loggable(path: str) -> str:
    """A path without signatures, and without what would forge lines or move a terminal's cursor."""
    for prefix in _SIGNED:
        if path.startswith(prefix):
            return f"{prefix}..."
    return quote(path[:_LOGGED_PATH], safe="/:")


class BodyLimit:
    """Refuses bodies over ``limit`` bytes, by their declared length or as they arrive.

    And those that do not arrive: a body has ``PATIENCE_S`` and as long again as it would take at
    ``SLOWEST_BYTES_PER_S``. Starlette's own limit on the size would answer in plain text, even in
    place of a refusal for want of a key. ``own_limit`` gives the limit of a path that has its own.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limit: int,
        patience_s: float = PATIENCE_S,
        own_limit: Callable[[str], int | None] = lambda _: None,
    ) -> None:
        self._app = app
        self._limit = limit
        self._patience_s = patience_s
        self._own_limit = own_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._own_limit(scope["path"]) or self._limit
        error = TooLarge(
            f"The request is larger than the {limit >> 20} MiB allowed; "
            "send a smaller picture, or its URL."
        )
        if _declared_length(scope) > limit:
            await error_response(error.status, error.message, error.name)(scope, receive, send)
            return
        received = 0
        waited_s = 0.0
        has_ended = False

        async def bounded() -> Message:
            nonlocal received, waited_s, has_ended
            if has_ended:  # what comes now is the end of the connection, whenever that is
                return await receive()
            started = time.monotonic()
            allowed_s = self._patience_s + received / SLOWEST_BYTES_PER_S
            try:
                async with asyncio.timeout(max(0.0, allowed_s - waited_s)):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow(received) from None
            waited_s += time.monotonic() - started
            received += len(message.get("body", b""))
            has_ended = not message.get("more_body", False)
            if received > limit:
                raise error
            return message

        await self._app(scope, bounded, send)

    def _too_slow(self, received: int) -> TooSlow:
        return TooSlow(
            f"Only {received:,} bytes of the request's body came in time; allowed are "
            f"{self._patience_s:g} s and another second for each {SLOWEST_BYTES_PER_S:,} bytes.",
            headers={"Connection": "close"},
        )


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


class Cors:
    """Answers preflights, and tells browsers which web pages may read what comes back.

    A page needs an API key like anyone else: keys are bearer tokens that no browser adds by itself,
    and cookies there are none. So a page's origin alone opens nothing, and any may call unless the
    operator names some. What needs no key (``/metrics``, ``/version``) is for no page of others.
    """

    def __init__(self, app: ASGIApp, *, origins: str) -> None:
        self._app = app
        self._opened = CORSMiddleware(
            app,
            allow_origins=origins_of(origins),
            allow_methods=_CORS_METHODS,
            allow_headers=["*"],  # those asked for: x-client-* are many, and none can do harm
            expose_headers=EXPOSED,
            max_age=PREFLIGHT_KEPT_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        is_open = scope["type"] == "http" and scope["path"].startswith(_OPEN)
        await (self._opened if is_open else self._app)(scope, receive, send)


def origins_of(setting: str) -> tuple[str, ...]:
    """The origins that ``--cors-origins`` names, written as browsers send them."""
    names = tuple(part.strip().lower() for part in setting.split(","))
    return () if names == (NONE,) else names


def headers_of_a_crash(path: str, origin: str | None, setting: str) -> dict[str, str]:
    """What lets a page read an answer that was made outside of ``Cors``, as that to a crash is."""
    origins = origins_of(setting)
    if origin is None or not path.startswith(_OPEN):
        return {}
    if ANY in origins:
        return {"Access-Control-Allow-Origin": ANY}
    return {"Access-Control-Allow-Origin": origin} if origin in origins else {}


def security_headers(path: str, given: Iterable[Header]) -> list[Header]:
    """The headers to add to an answer of ``path`` with the headers ``given``, none of them twice.

    JSON is kept by no cache (it holds prompts and signed URLs), pages run no foreign script and
    stand in no frame, pictures are sandboxed.
    """
    present = dict(given)
    kind = present.get(b"content-type", b"")
    added = [*_ALWAYS]
    if kind.startswith(b"application/json"):
        added.append(_NO_STORE)
    elif kind.startswith(b"text/html"):
        added += (*_PAGE, (b"content-security-policy", policy().encode()))
    elif path.startswith("/files/"):
        added += _FILE
    return [header for header in added if header[0] not in present]


def policy(page: bytes = b"") -> str:
    """The Content-Security-Policy of a page: own files, and the inline scripts ``page`` has."""
    digests = [hashlib.sha256(script).digest() for script in _INLINE_SCRIPT.findall(page)]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    return _POLICY.format(scripts=" ".join(["'self'", *hashes]))
