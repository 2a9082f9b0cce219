"""Places in the queue, looked for before a submit costs anything.

The store counts for good, in the transaction that accepts (``redux_server.tasks.accepting``). What is
refused there has had its pictures decoded, flushed to the disk and deleted again, which is most of
its cost; so who would be refused is told here first. Knows no HTTP.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from redux_server.api.coalescer import Coalescer
from redux_server.tasks.task import FreePlaces, KeyFull, QueueFull

Refusal = QueueFull | KeyFull


class QueueReservations:
    """Whether there is one for another task of a key; ``look`` says how many there are.

    Must be used from one event loop.
    """

    def __init__(self, look: Callable[[Sequence[str]], Sequence[FreePlaces]]) -> None:
        self._look = Coalescer(look, name="places")
        self._taken_soon: Counter[str] = Counter()
        self._change = asyncio.Event()

    async def look(self, key_id: str) -> Refusal | None:
        """Why a task of this key would be refused now; None when it would be accepted."""
        return (await self._look(key_id)).refusal()

    @asynccontextmanager
    async def hold(self, key_id: str) -> AsyncIterator[Refusal | None]:
        """Keep a place for a task until it is accepted: ``look``, and that for the others too.

        Who finds only places that others hold waits for what becomes of them: to store pictures for
        one place many times over would cost more.
        """
        while (refusal := (found := await self._look(key_id)).refusal()) is None:
            others = self._taken_soon
            if others.total() < found.of_all and others[key_id] < found.of_key:
                break
            await self._change.wait()
        if refusal is not None:
            yield refusal
            return
        self._taken_soon[key_id] += 1
        try:
            yield None
        finally:
            self._taken_soon -= Counter({key_id: 1})  # leaves no zeros
            self._change.set()
            self._change = asyncio.Event()

    def close(self) -> None:
        """Stop the thread that looks."""
        self._look.close()


# --- Rate limit -----------------------------------------------------------------------------------

# DOC How often each API key may submit: a token bucket per key, in the memory of this process.
# DOC
# DOC Several API processes each give out the whole rate; what must hold over all of them together is
# DOC ``--max-open-per-key``, which the database counts. Knows no HTTP.

_PRUNE_ABOVE = 10_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class RateLimit:
    """Lets each key through ``per_minute`` times a minute on average, and at once so often.

    0 lets everything through. ``clock`` gives seconds and never goes back. Not for use from more
    than one thread.
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
