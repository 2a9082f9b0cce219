"""Requests that are held until their task has ended: the hosted service's sync mode.

Workers may be processes or machines of their own, so the end is looked for in the store: by one
look for all that are held, a few times a second. A request that leaves, or is let go before the
end, changes nothing about its task. Knows no HTTP.
"""

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from redux_server import metrics
from redux_server.tasks import Code, Task

POLL_S = 0.2
MAX_HELD = 256
MAX_HELD_PER_KEY = 128
# Clients look for the first words, and one sends its request again for others ("timeout").
_TOO_EARLY = "Sync mode timed out: {reason}. The task goes on; ask for it at urls.get."
_log = structlog.get_logger("redux_server.sync_mode")


@dataclass(frozen=True, slots=True)
class Held:
    """What a request was held for: its task as it is now, and why that is not its end yet.

    The task is None where it was deleted meanwhile, ``too_early`` empty where it has ended.
    """

    task: Task | None
    too_early: str = ""

    def explain(self, data: dict[str, Any]) -> dict[str, Any]:
        """The prediction object ``data`` as clients are told that they have to poll."""
        if not self.too_early:
            return data
        code, error = Code.SYNC_TIMED_OUT, _TOO_EARLY.format(reason=self.too_early)
        return data | {"status": "processing", "code": code, "error": error}


class SyncMode:
    """Holds requests, from one event loop. ``find`` gives tasks by id, several in one look."""

    def __init__(
        self,
        find: Callable[[str], Awaitable[Task | None]],
        *,
        limit_s: float,
        poll_s: float = POLL_S,
    ) -> None:
        self._find = find
        self._limit_s = limit_s
        self._poll_s = poll_s
        self._waiting: defaultdict[str, list[asyncio.Future[Task | None]]] = defaultdict(list)
        self._held: Counter[str] = Counter()  # by API key
        self._poller: asyncio.Task[None] | None = None
        self._is_closed = False

    async def hold(self, task: Task, leaves: Callable[[], Coroutine[Any, Any, None]]) -> Held:
        """Wait for the end of ``task``, at most until the limit or until ``leaves`` returns."""
        held = await self._hold(task, leaves)
        metrics.SYNC_ANSWERS.labels("too_early" if held.too_early else "ended").inc()
        return held

    def close(self) -> None:
        """Let go of every request, those to come too: the process is about to end."""
        self._is_closed = True
        for futures in self._waiting.values():
            for future in futures:
                future.cancel()

    async def _hold(self, task: Task, leaves: Callable[[], Coroutine[Any, Any, None]]) -> Held:
        if task.status.is_terminal:
            return Held(task)
        if self._is_closed:
            return Held(task, "the server is about to stop")
        if self._held.total() >= MAX_HELD or self._held[task.key_id] >= MAX_HELD_PER_KEY:
            return Held(task, "the server holds as many requests as it may")
        async with self._registered(task) as future:
            leaving = asyncio.create_task(leaves())
            try:
                both: set[asyncio.Future[Any]] = {future, leaving}
                await asyncio.wait(
                    both,
                    timeout=self._limit_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                leaving.cancel()
        if future.done() and not future.cancelled():
            return Held(future.result())
        return await self._last_look(task)

    async def _last_look(self, task: Task) -> Held:
        reason = (
            "the server is about to stop"
            if self._is_closed
            else f"the task has not ended within {self._limit_s:g} s"
        )
        try:
            now = await self._find(task.id)
        except Exception:  # the database is away: what was true before will do
            return Held(task, reason)
        has_ended = now is None or now.status.is_terminal
        return Held(now, "" if has_ended else reason)

    @asynccontextmanager
    async def _registered(self, task: Task) -> AsyncIterator["asyncio.Future[Task | None]"]:
        future: asyncio.Future[Task | None] = asyncio.get_running_loop().create_future()
        self._held[task.key_id] += 1
        self._waiting[task.id].append(future)
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll())
        try:
            yield future
        finally:
            self._held[task.key_id] -= 1
            self._held += Counter()  # drops those that have none
            self._waiting[task.id].remove(future)
            if not self._waiting[task.id]:
                del self._waiting[task.id]

    async def _poll(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(self._poll_s)
                with contextlib.suppress(Exception):  # counted and logged where it comes from
                    await self._look()
        finally:
            self._poller = None

    async def _look(self) -> None:
        ids = list(self._waiting)
        found = await asyncio.gather(*map(self._find, ids), return_exceptions=True)
        errors = [each for each in found if isinstance(each, BaseException)]
        if errors:
            _log.warning("cannot look for the ends of tasks", reason=type(errors[0]).__name__)
        for task_id, task in zip(ids, found, strict=True):
            if isinstance(task, BaseException) or (task and not task.status.is_terminal):
                continue
            for future in self._waiting.get(task_id, ()):
                if not future.done():
                    future.set_result(task)
