"""How often each API key may submit: a token bucket per key, in the memory of this process.

Several API processes each give out the whole rate; what must hold over all of them together is
``--max-open-per-key``, which the database counts. Knows no HTTP.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

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
