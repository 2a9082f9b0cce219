"""Stopping without leaving anyone alone: no task is accepted any more, everything else goes on.

At the first signal the server refuses submits and says so to load balancers (``/readyz``), while
its workers finish what is on their devices; polls and downloads are answered meanwhile. Then it
ends. A second signal ends it without waiting for that.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import structlog
import uvicorn

_log = structlog.get_logger("redux_server.draining")


class Draining:
    """Whether this process is on its way out."""

    def __init__(self) -> None:
        self.is_on = False


class DrainingServer(uvicorn.Server):
    """Serves until a signal, and then until ``drain`` is done."""

    def __init__(
        self, config: uvicorn.Config, draining: Draining, drain: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(config)
        self._draining = draining
        self._drain = drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, *args: Any, **options: Any) -> None:
        """As uvicorn does."""
        self._loop = asyncio.get_running_loop()
        await super().serve(*args, **options)

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
