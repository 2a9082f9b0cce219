"""Tasks that streams follow: one look at the database for all of them. Knows no HTTP.

A stream keeps nothing but that its task has changed, and reads it anew when it can send again: a
slow reader holds no memory and misses steps, never the end.
"""

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog

from redux_server import metrics
from redux_server.database.connection import DATABASE_AWAY
from redux_server.tasks.task import Code, Task

EVERY_S = 0.25
MAX_STREAMS = 1000
MAX_STREAMS_OF_A_KEY = 100
NOT_LOOKED_AT = object()
_BATCH = 500
_log = structlog.get_logger("redux_server.api.following")


class TooManyStreams(Exception):
    """There is no room for one more: of this key (``is_of_key``), or of anyone."""

    def __init__(self, *, is_of_key: bool) -> None:
        super().__init__()
        self.is_of_key = is_of_key


class Subscription:
    """One stream's eye on one task."""

    def __init__(self, task_id: str, key_id: str) -> None:
        self.task_id = task_id
        self.key_id = key_id
        self.seen: object = NOT_LOOKED_AT
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Say that there is something new."""
        self._changed.set()

    async def wait(self, timeout_s: float) -> bool:
        """Wait for news; False if there were none in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        is_new = self._changed.is_set()
        self._changed.clear()
        return is_new


class Streams:
    """The open streams of this process. Must be used from one event loop.

    ``glance`` takes ids and gives what may change of each task that there is; it runs on a thread.
    """

    def __init__(
        self,
        glance: Callable[[Sequence[str]], Mapping[str, object]],
        *,
        most: int = MAX_STREAMS,
        most_of_a_key: int = MAX_STREAMS_OF_A_KEY,
        every_s: float = EVERY_S,
    ) -> None:
        self._glance = glance
        self._most = most
        self._most_of_a_key = most_of_a_key
        self._every_s = every_s
        self._open: set[Subscription] = set()
        self._by_key: Counter[str] = Counter()
        self._poller: asyncio.Task[None] | None = None
        self.is_closed = False

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def open(self, task_id: str, key_id: str) -> Subscription:
        """Follow a task, until ``release``.

        Raises:
            TooManyStreams: as many as may be are open, or the server is stopping.
        """
        if self.is_closed or len(self._open) >= self._most:
            raise TooManyStreams(is_of_key=False)
        if self._by_key[key_id] >= self._most_of_a_key:
            raise TooManyStreams(is_of_key=True)
        watch = Subscription(task_id, key_id)
        self._open.add(watch)
        self._by_key[key_id] += 1
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll())
        return watch

    def release(self, watch: Subscription) -> None:
        """The stream has ended; may be called twice."""
        if watch in self._open:
            self._open.remove(watch)
            self._by_key[watch.key_id] -= 1
            if not self._by_key[watch.key_id]:
                del self._by_key[watch.key_id]

    def close(self) -> None:
        """Have every stream end now, and open no more: the server is stopping."""
        self.is_closed = True
        for watch in self._open:
            watch.wake()
        if self._poller is not None:
            self._poller.cancel()

    async def _poll(self) -> None:
        try:
            while self._open:
                await self._look()
                await asyncio.sleep(self._every_s)
        finally:
            self._poller = None

    async def _look(self) -> None:
        for ids in _batches(sorted({watch.task_id for watch in self._open})):
            try:
                found = await asyncio.to_thread(self._glance, ids)
            except DATABASE_AWAY:
                return  # streams go on with their heartbeats; the next look may succeed
            except Exception as error:
                _log.error("streams could not be served", exc_info=error)
                return
            looked_for = set(ids)
            for watch in self._open:
                state = found.get(watch.task_id)
                if watch.task_id in looked_for and state != watch.seen:
                    watch.seen = state
                    watch.wake()


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _BATCH):
        yield ids[start : start + _BATCH]


# --- Sync mode ------------------------------------------------------------------------------------

# DOC Requests that are held until their task has ended: the hosted service's sync mode.
# DOC
# DOC Workers may be processes or machines of their own, so the end is looked for in the store: by one
# DOC look for all that are held, a few times a second. A request that leaves, or is let go before the
# DOC end, changes nothing about its task. Knows no HTTP.

POLL_S = 0.2
MAX_HELD = 256
MAX_HELD_PER_KEY = 128
# Clients look for the first words, and one sends its request again for others ("timeout").
_TOO_EARLY = "Sync mode timed out: {reason}. The task goes on; ask for it at urls.get."


@dataclass(frozen=True, slots=True)
class HeldAnswer:
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

    async def hold(self, task: Task, leaves: Callable[[], Coroutine[Any, Any, None]]) -> HeldAnswer:
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

    async def _hold(
        self, task: Task, leaves: Callable[[], Coroutine[Any, Any, None]]
    ) -> HeldAnswer:
        if task.status.is_terminal:
            return HeldAnswer(task)
        if self._is_closed:
            return HeldAnswer(task, "the server is about to stop")
        if self._held.total() >= MAX_HELD or self._held[task.key_id] >= MAX_HELD_PER_KEY:
            return HeldAnswer(task, "the server holds as many requests as it may")
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
            return HeldAnswer(future.result())
        return await self._last_look(task)

    async def _last_look(self, task: Task) -> HeldAnswer:
        reason = (
            "the server is about to stop"
            if self._is_closed
            else f"the task has not ended within {self._limit_s:g} s"
        )
        try:
            now = await self._find(task.id)
        except Exception:  # the database is away: what was true before will do
            return HeldAnswer(task, reason)
        has_ended = now is None or now.status.is_terminal
        return HeldAnswer(now, "" if has_ended else reason)

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
