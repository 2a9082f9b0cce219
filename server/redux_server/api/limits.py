"""What bounds submits before they cost anything: places in the queue, bytes of the disk, a rate.

The store counts open tasks for good, in the transaction that accepts
(``redux_server.tasks.accepting``). What is refused there has had its body read and its pictures
decoded, flushed to the disk and deleted again, which is most of its cost; so who would be refused
is told here first. Knows no HTTP.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from redux_server.api.coalescer import Coalescer
from redux_server.settings import ServerSettings
from redux_server.storage.disk import DiskSpace
from redux_server.storage.opening import local_folder
from redux_server.tasks.task import FreePlaces, KeyFull, NoRoom, ShareFull, StoreFull

Refusal = NoRoom | KeyFull | ShareFull | StoreFull
FRESH_S = 1.0
"""How long the count of a look may stand for one of its own when a place is reserved."""
_PRUNE_ABOVE = 10_000


class _Count(NamedTuple):
    """Free places; when counting began, and how many reservations had ended by then."""

    free: FreePlaces
    at: float
    ended: int


class Reservation:
    """The place of one request: looked for while its body comes, reserved once that is here.

    So a body that comes slowly keeps nobody else out of the queue.
    """

    def __init__(self, queue: "QueueReservations", key_id: str) -> None:
        self._queue = queue
        self._looked: _Count | None = None
        self.key_id = key_id
        self.is_reserved = False

    async def look(self) -> Refusal | None:
        """Why there is no place now; None if there is one. Reserves nothing, waits for nobody."""
        self._looked = await self._queue.count(self.key_id)
        return self._looked.free.refusal()

    async def reserve(self, needed_bytes: int = 1) -> Refusal | None:
        """Why there is no place; None when one is reserved, until the end of ``hold``.

        ``needed_bytes`` is what the task will count at least.
        """
        refusal = await self._queue.reserve(self.key_id, self._looked, needed_bytes)
        self.is_reserved = refusal is None
        return refusal


class QueueReservations:
    """The places that requests of this process are about to take.

    ``count`` says how many are free for each of some API keys; ``clock`` gives seconds and never
    goes back. Must be used from one event loop.
    """

    def __init__(
        self,
        count: Callable[[Sequence[str]], Sequence[FreePlaces]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = Coalescer(count, name="free places")
        self._clock = clock
        self._reserved: Counter[str] = Counter()  # by API key
        self._ended = 0
        self._change = asyncio.Event()

    @contextmanager
    def hold(self, key_id: str) -> Iterator[Reservation]:
        """The place for a task of this key; what is reserved of it is free again afterwards.

        Nothing is counted before it is looked for or reserved.
        """
        reservation = Reservation(self, key_id)
        try:
            yield reservation
        finally:
            if reservation.is_reserved:
                self._end(key_id)

    async def count(self, key_id: str) -> _Count:
        """Ask how many places are free."""
        at, ended = self._clock(), self._ended
        return _Count(await self._count(key_id), at, ended)

    async def reserve(
        self, key_id: str, looked: _Count | None, needed_bytes: int = 1
    ) -> Refusal | None:
        """Reserve a place that nobody else has reserved; ``looked`` is an earlier count, if any.

        Who finds only reserved places waits for what becomes of them: to store pictures for one
        place many times over would cost more.
        """
        is_fresh = looked is not None and self._clock() - looked.at < FRESH_S
        count = looked if is_fresh else None
        if count is not None and count.free.refusal(needed_bytes) is not None:
            count = None
        while count is None or not self._has_room(count, key_id):
            change = self._change
            count = await self.count(key_id)
            if (refusal := count.free.refusal(needed_bytes)) is not None:
                return refusal
            if not self._has_room(count, key_id):
                await change.wait()
        self._reserved[key_id] += 1
        return None

    def close(self) -> None:
        """Stop the thread that counts."""
        self._count.close()

    def _has_room(self, count: _Count, key_id: str) -> bool:
        # Whose reservation ended meanwhile may have been accepted, and not be in this count yet.
        unsure = self._ended - count.ended
        others, of_key = self._reserved.total() + unsure, self._reserved[key_id] + unsure
        free = count.free
        return free.of_all > others and min(free.of_key, free.of_share) > of_key

    def _end(self, key_id: str) -> None:
        self._reserved -= Counter({key_id: 1})  # leaves no zeros
        self._ended += 1
        self._change.set()
        self._change = asyncio.Event()


class StorageShare:
    """How many bytes more the tasks of an API key may store: by a limit, and of the disk."""

    def __init__(self, settings: ServerSettings, disk: DiskSpace) -> None:
        self._most_bytes = settings.max_stored_tasks * 2**20
        is_on_disk = local_folder(settings.blob_url, settings.blobs_dir) is not None
        self._share = settings.disk_share if is_on_disk else 100  # a bucket has no end
        self._disk = disk

    def left(self, stored_bytes: int) -> int:
        """What is left for a key whose tasks count so many; less than 0 beyond the bounds."""
        left = self._most_bytes - stored_bytes if self._most_bytes else sys.maxsize
        if self._share < 100:
            left = min(left, self._disk.left_of_share(self._share, stored_bytes))
        return left


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class RateLimit:
    """Lets each key through ``per_minute`` times a minute on average, and at once so often.

    0 lets everything through. The token buckets are in the memory of this process: several API
    processes each give out the whole rate, and what must hold over all of them together is
    ``--max-open-per-key``, which the database counts. ``clock`` gives seconds and never goes back.
    Not for use from more than one thread.
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key_id: str) -> float:
        """Use one submit of ``key_id``: 0, or the seconds until it has one again."""
        if not self._per_minute:
            return 0.0
        now = self._clock()
        bucket = self._buckets.get(key_id)
        if bucket is None:
            self._prune(now)
            bucket = self._buckets[key_id] = _Bucket(self._per_minute, now)
        bucket.tokens = self._level(bucket, now)
        bucket.filled_at = now
        if bucket.tokens < 1:
            return (1 - bucket.tokens) * 60 / self._per_minute
        bucket.tokens -= 1
        return 0.0

    def _level(self, bucket: _Bucket, now: float) -> float:
        return min(
            self._per_minute, bucket.tokens + (now - bucket.filled_at) * self._per_minute / 60
        )

    def _prune(self, now: float) -> None:
        """Forget full buckets: they say no more than none."""
        if len(self._buckets) >= _PRUNE_ABOVE:
            self._buckets = {
                key: bucket
                for key, bucket in self._buckets.items()
                if self._level(bucket, now) < self._per_minute
            }
