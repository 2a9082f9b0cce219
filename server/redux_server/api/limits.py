"""What bounds submits before they cost anything: reserved places in the queue, and a rate.

The store counts open tasks for good, in the transaction that accepts
(``redux_server.tasks.accepting``). What is refused there has had its body read and its pictures
decoded, flushed to the disk and deleted again, which is most of its cost; so who would be refused
is told here first. Knows no HTTP.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from redux_server.api.coalescer import Coalescer
from redux_server.tasks.task import FreePlaces, KeyFull, NoRoom

Refusal = NoRoom | KeyFull
KEPT_S = 5.0
_PRUNE_ABOVE = 10_000


class Reservation:
    """The place of one request: looked for when it is first asked about, and then kept."""

    def __init__(self, queue: "QueueReservations", key_id: str) -> None:
        self._queue = queue
        self._found: tuple[Refusal | None] | None = None
        self.key_id = key_id
        self.expiry: asyncio.TimerHandle | None = None

    async def refusal(self) -> Refusal | None:
        """Why there is no place; None if there is one. The first answer stands."""
        if self._found is None:
            self._found = (await self._queue.reserve(self),)
        return self._found[0]


class QueueReservations:
    """The places that requests of this process are about to take.

    ``count`` says how many are free for each of some API keys. Must be used from one event loop.
    """

    def __init__(
        self,
        count: Callable[[Sequence[str]], Sequence[FreePlaces]],
        *,
        kept_s: float = KEPT_S,
    ) -> None:
        self._count = Coalescer(count, name="free places")
        self._kept_s = kept_s
        self._reserved: Counter[str] = Counter()  # by API key
        self._releases = 0
        self._change = asyncio.Event()

    @contextmanager
    def hold(self, key_id: str) -> Iterator[Reservation]:
        """The place for a task of this key, reserved for the others to see until the end of this.

        Nothing is counted before ``Reservation.refusal`` is called.
        """
        reservation = Reservation(self, key_id)
        try:
            yield reservation
        finally:
            self._release(reservation)

    async def reserve(self, reservation: Reservation) -> Refusal | None:
        """Count, and reserve a place if one is free that nobody else has reserved.

        Who finds only reserved places waits for what becomes of them: to store pictures for one
        place many times over would cost more. A reservation lasts for ``kept_s`` seconds, so that a
        body that comes slowly does not keep others out; whoever takes longer may find no room in
        the transaction.
        """
        key_id = reservation.key_id
        while True:
            change, releases = self._change, self._releases
            free = await self._count(key_id)
            if (refusal := free.refusal()) is not None:
                return refusal
            # Who was released meanwhile may have been accepted, and not be in this count yet.
            unsure = self._releases - releases
            others, of_key = self._reserved.total() + unsure, self._reserved[key_id] + unsure
            if free.of_all > others and free.of_key > of_key:
                self._reserved[key_id] += 1
                loop = asyncio.get_running_loop()
                reservation.expiry = loop.call_later(self._kept_s, self._release, reservation)
                return None
            await change.wait()

    def close(self) -> None:
        """Stop the thread that counts."""
        self._count.close()

    def _release(self, reservation: Reservation) -> None:
        if reservation.expiry is not None:
            reservation.expiry.cancel()
            reservation.expiry = None
            self._reserved -= Counter({reservation.key_id: 1})  # leaves no zeros
            self._releases += 1
            self._change.set()
            self._change = asyncio.Event()


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
