"""uvicorn, with bounds on each connection, and with an end that leaves nobody without an answer.

uvicorn bounds neither the size of a request's head nor the time until it is complete, and it goes
on reading a body after the answer was sent; ``BoundedHttpProtocol`` bounds all three. It also reads
the body of a request that offers another protocol (``Upgrade``), which uvicorn's parser leaves
lying. The time that a body may take while it is still wanted is
``redux_server.api.middleware.BodyLimit``'s. Knows no path and no task.
"""

import asyncio
import json
import signal
import threading
from asyncio import TimerHandle
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from types import FrameType
from typing import Any

import httptools
import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from redux_server import metrics
from redux_server.errors import error_body

MAX_HEAD_BYTES = 32 * 2**10
MAX_TARGET_BYTES = 16 * 2**10
MAX_HEADERS = 100
_HEADER_FRAME_BYTES = 4  # ": " and the line's end
_OF_AN_OFFER = (b"upgrade", b"http2-settings")
_log = structlog.get_logger("redux_server.api.http_server")


class BoundedHttpProtocol(HttpToolsProtocol):
    """One client's connection, closed when it takes more than a request needs.

    ``head_s`` is how long a request's head may take, from the opening of the connection or from
    its first byte; ``rest_s`` how long the rest of a body may take once it was answered.
    """

    head_s = 10.0
    rest_s = 10.0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._is_in_head = True
        self._is_in_message = False
        self._is_refused = False
        self._head_bytes = 0  # as they came, a body that came along included
        self._timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: who connects has something to say."""
        super().connection_made(transport)
        self._start_timer(self.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, unless this connection has used up its rights."""
        if self._is_refused:
            return
        if self._is_in_head:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            if not self._is_refused:
                self.send_400_response("")
            return
        if self._is_refused or not self._is_in_head:
            return
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        elif not self._is_timed() and not self._is_answering():
            self._start_timer(self.head_s)

    def _parse(self, data: bytes) -> None:
        """Feed the parser, and take no offer of another protocol.

        Where a head offers one, the parser has ended the message there: the body would be that
        protocol's. It is not (RFC 9110, section 7.8), so a new parser is told the same head without
        the offer, and goes on with the body.

        Raises:
            httptools.HttpParserError: this is no HTTP.
        """
        rest = memoryview(data)
        while not self._is_refused:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
                if not self._is_refused:
                    head = self._head_without_offer()
                    self.parser = self._new_parser()
                    self.parser.feed_data(head)

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        return parser

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(each for each in options if each.lower() not in _OF_AN_OFFER)
            if name not in _OF_AN_OFFER:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._is_in_message = True

    def on_headers_complete(self) -> None:
        """Let the request in, if its head is of a usual size."""
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self.send_400_response("")
            return  # it comes again without the offer
        self._stop_timer()
        self._is_in_head = False
        size = sum(len(name) + len(value) + _HEADER_FRAME_BYTES for name, value in self.headers)
        if len(self.url) > MAX_TARGET_BYTES:
            self._refuse(414, f"The URL has {len(self.url)} bytes", f"{MAX_TARGET_BYTES}")
        elif len(self.headers) > MAX_HEADERS:
            given = f"The request has {len(self.headers)} headers"
            self._refuse(431, given, f"{MAX_HEADERS}")
        elif len(self.url) + size > MAX_HEAD_BYTES:
            self._refuse_head()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Part of a body."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request's last byte; the next one's head follows."""
        if self.parser.should_upgrade():
            return  # its body follows
        self._is_in_message = False
        self._is_in_head = True
        self._head_bytes = 0
        if self._is_refused:
            return
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Bound the rest of a body that nobody waits for any more."""
        super().on_response_complete()
        if self._is_in_message and self._timer is None and not self.transport.is_closing():
            self._start_timer(self.rest_s)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in the shape of all other refusals."""
        self._answer(400, "http_error", "This is not a valid HTTP/1.1 request.")

    def _is_timed(self) -> bool:
        return self._timer is not None or self.timeout_keep_alive_task is not None

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse_head(self) -> None:
        self._refuse(431, "The request line and headers are larger", f"{MAX_HEAD_BYTES} bytes")

    def _refuse(self, status: int, given: str, allowed: str) -> None:
        metrics.REJECTED.labels("head").inc()
        _log.warning("request head refused", status=status)
        self._answer(status, "too_large", f"{given}; allowed are at most {allowed}.")

    def _answer(self, status: int, name: str, message: str) -> None:
        """Answer without the app, and close."""
        self._is_refused = True
        body = json.dumps(error_body(status, message, name)).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\ncache-control: no-store\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._time_is_over)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_is_over(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._is_refused = True
            self.transport.close()


class Draining:
    """Whether this process is on its way out: then it accepts no task, and does all else."""

    def __init__(self) -> None:
        self.is_on = False


class DrainingServer(uvicorn.Server):
    """Serves until a signal, and then until ``drain`` is done.

    From the first signal on, submits are refused and load balancers are told (``/readyz``), while
    workers finish what is on their devices; polls and downloads are answered meanwhile. A second
    signal ends the server without waiting for that. ``must_end`` ends it at once, too.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        draining: Draining,
        drain: Callable[[], Awaitable[None]],
        *,
        must_end: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(config)
        self._must_end = must_end
        self._draining = draining
        self._drain = drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, *args: Any, **options: Any) -> None:
        """As uvicorn does."""
        self._loop = asyncio.get_running_loop()
        await super().serve(*args, **options)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, and SIGHUP too, as a closed terminal sends it, unless it is ignored."""
        with super().capture_signals():
            former = signal.getsignal(signal.SIGHUP)
            is_ours = threading.current_thread() is threading.main_thread()
            if not is_ours or former == signal.SIG_IGN:
                yield
                return
            signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, former)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; whether to end."""
        return await super().on_tick(counter) or self._must_end()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came: the first one drains, if there is anything to drain yet."""
        if self._draining.is_on or not self.started or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)  # what it would have done is done in the end
        self._draining.is_on = True
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        assert self._loop is not None
        self._ending = self._loop.create_task(self._finish())

    async def _finish(self) -> None:
        _log.info("stopping: no task is accepted any more")
        try:
            await self._drain()
        finally:
            self.should_exit = True
