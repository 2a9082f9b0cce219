"""What surrounds every request: an id, a log line, a size limit. Plain ASGI, nothing buffered."""

import re
import secrets
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redux_server import metrics
from redux_server.errors import TooLarge, error_response

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
_log = structlog.get_logger("redux_server.http")


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
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _record(scope, status, time.perf_counter() - started)
            structlog.contextvars.unbind_contextvars("request_id")


class BodyLimit:
    """Refuses bodies over ``limit`` bytes, by their declared length or as they arrive.

    Starlette's own limit would answer in plain text, even in place of a refusal for want of a key.
    """

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = TooLarge(
            f"The request is larger than the {self._limit >> 20} MiB allowed; "
            "send a smaller picture, or its URL."
        )
        if _declared_length(scope) > self._limit:
            await error_response(error.status, error.message, error.name)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise error
            return message

        await self._app(scope, counted, send)


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            return text if _REQUEST_ID.fullmatch(text) else None
    return None


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def _record(scope: Scope, status: int, seconds: float) -> None:
    route = getattr(scope.get("route"), "path", None)  # FastAPI's; Starlette's leave a function
    route = route or getattr(scope.get("endpoint"), "__name__", "unmatched")
    method = scope["method"] if scope["method"] in _METHODS else "other"  # a stranger's choice
    metrics.HTTP.labels(method, route, str(status)).observe(seconds)
    # Polls are many and say nothing; the query string is never logged, it may hold a secret.
    report = _log.debug if scope["method"] == "GET" and status < 400 else _log.info
    report(
        "request",
        method=scope["method"],
        path=scope["path"] if not scope["path"].startswith("/files/") else "/files/...",
        status=status,
        duration_ms=round(seconds * 1000, 1),
    )
