"""Compressed bodies of requests, decompressed on their way to the routes.

Piece by piece, so that a bomb costs no more memory than any other body, and is refused as soon as
it has more bytes than its path allows. The bytes on the wire, and the time that they take, are the
business of ``redux_server.api.middleware.BodyLimit``. Knows no path.
"""

import asyncio
import zlib
from collections.abc import Callable, Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redux_server.errors import BadRequest, TooLarge, UnsupportedCoding, error_response
from redux_server.net.content_coding import READ, Content, codings


class Decompression:
    """Hands bodies in gzip or deflate on as what they hold, and refuses other codings by 415.

    ``limit_of`` gives the most bytes that a body may have on a path. The app sees neither the
    coding nor the length that the compressed body had.
    """

    def __init__(self, app: ASGIApp, *, limit_of: Callable[[str], int]) -> None:
        self._app = app
        self._limit_of = limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        given = codings(_coding_header(scope)) if scope["type"] == "http" else []
        if not given:
            await self._app(scope, receive, send)
            return
        if len(given) > 1 or given[0] not in READ:
            error = UnsupportedCoding(
                f"Bodies with Content-Encoding {', '.join(given)[:80]!r} are not read; "
                "send it as it is, or in gzip or deflate.",
                headers={"Accept-Encoding": "gzip, deflate"},
            )
            response = error_response(error.status, error.message, error.name, error.headers)
            await response(scope, receive, send)
            return
        hidden = (b"content-encoding", b"content-length")
        headers = [header for header in scope["headers"] if header[0] not in hidden]
        body = _Body(receive, given[0], self._limit_of(scope["path"]))
        await self._app({**scope, "headers": headers}, body.receive, send)


def _coding_header(scope: Scope) -> str:
    values = [value for name, value in scope["headers"] if name == b"content-encoding"]
    return b",".join(values).decode("latin-1")


class _Body:
    """One body, as ``receive`` gives it, and as the app receives it."""

    def __init__(self, receive: Receive, coding: str, limit: int) -> None:
        self._receive = receive
        self._coding = coding
        self._limit = limit
        self._content = Content(coding)
        self._waiting: Iterator[bytes] = iter(())
        self._size_bytes = 0
        self._has_come = False
        self._has_ended = False

    async def receive(self) -> Message:
        """The next piece of content.

        Raises:
            BadRequest: it is not of the coding that it was said to have.
            TooLarge: it has more bytes than it may.
        """
        while not self._has_ended:
            try:
                piece = next(self._waiting, b"")
            except zlib.error:
                raise self._wrong() from None
            if piece:
                return await self._counted(piece)
            if self._has_come:
                self._has_ended = True
                if not self._content.is_complete:
                    raise self._wrong()
                return {"type": "http.request", "body": b"", "more_body": False}
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._has_come = not message.get("more_body", False)
            self._waiting = self._content.pieces(message.get("body", b""))
        return await self._receive()

    async def _counted(self, piece: bytes) -> Message:
        self._size_bytes += len(piece)
        if self._size_bytes > self._limit:
            raise TooLarge(
                f"The request is larger than the {self._limit >> 20} MiB allowed, once it is "
                "decompressed; send a smaller picture, or its URL."
            )
        await asyncio.sleep(0)  # others' turn: a few bytes can hold many pieces
        return {"type": "http.request", "body": piece, "more_body": True}

    def _wrong(self) -> BadRequest:
        return BadRequest(
            f"The body is no complete {self._coding}, though Content-Encoding says so; send it "
            "as it is, and without that header."
        )
