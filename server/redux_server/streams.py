"""Tasks that streams follow: one look at the database for all of them. Knows no HTTP.

A stream keeps nothing but that its task has changed, and reads it anew when it can send again: a
slow reader holds no memory and misses steps, never the end.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import structlog

from redux_server.database import DATABASE_AWAY

EVERY_S = 0.25
MAX_STREAMS = 1000
MAX_STREAMS_OF_A_KEY = 100
NOT_LOOKED_AT = object()
_BATCH = 500

_log = structlog.get_logger("redux_server.streams")


class TooManyStreams(Exception):
    """There is no room for one more: of this key (``is_of_key``), or of anyone."""

    def __init__(self, *, is_of_key: bool) -> None:
        super().__init__()
        self.is_of_key = is_of_key


class Watch:
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
        self._open: set[Watch] = set()
        self._by_key: Counter[str] = Counter()
        self._poller: asyncio.Task[None] | None = None
        self.is_closed = False

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def open(self, task_id: str, key_id: str) -> Watch:
        """Follow a task, until ``release``.

        Raises:
            TooManyStreams: as many as may be are open, or the server is stopping.
        """
        if self.is_closed or len(self._open) >= self._most:
            raise TooManyStreams(is_of_key=False)
        if self._by_key[key_id] >= self._most_of_a_key:
            raise TooManyStreams(is_of_key=True)
        watch = Watch(task_id, key_id)
        self._open.add(watch)
        self._by_key[key_id] += 1
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll())
        return watch

    def release(self, watch: Watch) -> None:
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
