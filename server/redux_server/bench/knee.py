"""The knee: the highest rate at which the 95th percentile of latency stays below a limit.

Rates are doubled until one is too much, then the gap is halved (on a logarithmic scale). A rate is
carried if p95, counted from the scheduled starts, is below the limit, and if the latency does not
grow so fast that it would be above it within ten minutes: a queue that only begins to build up
betrays itself in its slope. Knows no HTTP and no clock.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from redux_server.bench.statistics import students_t

PRECISION = 1.05
"""The search ends when the lowest rate that failed is at most so many times the highest carried."""

HORIZON_S = 600.0
MIN_REQUESTS = 20
_GROUPS = 8
_MAX_DOUBLINGS = 12


@dataclass(frozen=True, slots=True)
class Probe:
    """What was seen at one rate. ``latencies`` are (scheduled second, seconds; inf: no images)."""

    rate: float
    latencies: Sequence[tuple[float, float]]
    slo_s: float
    is_whole: bool = True

    @property
    def p95_s(self) -> float:
        """The 95th percentile of all requests, those without images included; inf for none."""
        if not self.latencies:
            return math.inf
        ordered = sorted(seconds for _, seconds in self.latencies)
        return ordered[math.ceil(0.95 * len(ordered)) - 1]

    @property
    def growth(self) -> float:
        """Seconds of latency gained a second, as far as that is certain; else 0.

        The slope over the means of eight groups, less its standard error times Student's t: means
        of groups, because neighbours in a queue are alike.
        """
        finite = [each for each in self.latencies if each[1] < math.inf]
        if len(finite) < 2 * _GROUPS:
            return 0.0
        groups = np.array_split(np.asarray(sorted(finite)), _GROUPS)
        at, seconds = np.array([group.mean(axis=0) for group in groups]).T
        spread = float(((at - at.mean()) ** 2).sum())
        slope = float(((at - at.mean()) * seconds).sum()) / spread
        rest = seconds - seconds.mean() - slope * (at - at.mean())
        error = math.sqrt(float((rest**2).sum()) / (_GROUPS - 2) / spread)
        return max(0.0, slope - students_t(_GROUPS - 2) * error)

    @property
    def is_carried(self) -> bool:
        """Whether the rate can be kept up within the limit."""
        if not self.is_whole or self.p95_s >= self.slo_s:
            return False
        return self.p95_s + self.growth * HORIZON_S < self.slo_s

    @property
    def goodput(self) -> float:
        """Requests answered within the limit, a minute at this rate."""
        good = sum(seconds < self.slo_s for _, seconds in self.latencies)
        return self.rate * good / len(self.latencies) if self.latencies else 0.0

    def told(self, num_images: int = 1) -> dict[str, Any]:
        """As reports have it, in images a minute."""
        return {
            "images_per_minute": round(self.rate * num_images, 4),
            "requests": len(self.latencies),
            "p95_s": round(self.p95_s, 4) if self.p95_s < math.inf else None,
            "goodput_per_minute": round(self.goodput * num_images, 4),
            "is_carried": self.is_carried,
        }


@dataclass(slots=True)
class KneeSearch:
    """Which rate to try next, in requests a minute; ``budget`` requests are all it may ask for."""

    rate: float
    budget: int
    probes: list[Probe] = field(default_factory=list)

    @property
    def carried(self) -> Probe | None:
        """The highest rate that was carried, below all that were not."""
        good = [probe for probe in self.probes if probe.is_carried and probe.rate < self.too_much]
        return max(good, key=lambda probe: probe.rate, default=None)

    @property
    def too_much(self) -> float:
        """The lowest rate that was not carried; inf if all were."""
        return min((each.rate for each in self.probes if not each.is_carried), default=math.inf)

    @property
    def is_bracketed(self) -> bool:
        """Whether the knee is known to ``PRECISION``."""
        return self.carried is not None and self.too_much <= self.carried.rate * PRECISION

    def next_rate(self) -> float | None:
        """The rate to try; None when the knee is known, or there is no way to learn it."""
        if not self.probes:
            return self.rate
        carried, too_much = self.carried, self.too_much
        if len(self.probes) >= 2 * _MAX_DOUBLINGS or self.is_bracketed:
            return None
        if carried is None:
            lowest = too_much / 2
            return lowest if lowest > self.rate / 2**_MAX_DOUBLINGS else None
        if too_much == math.inf:
            return carried.rate * 2
        return math.sqrt(carried.rate * too_much)

    def told(self, num_images: int = 1) -> dict[str, Any] | None:
        """As reports have it, in images a minute; None where no rate was carried."""
        carried = self.carried
        if carried is None:
            return None
        ends = [carried.rate, self.too_much]
        return {
            "images_per_minute": round(carried.rate * num_images, 4),
            "between": [round(end * num_images, 4) if end < math.inf else None for end in ends],
            "is_bracketed": self.is_bracketed,
            "p95_s": round(carried.p95_s, 4),
            "goodput_per_minute": round(carried.goodput * num_images, 4),
        }


def probe_size(rate: float, duration_s: float) -> int:
    """How many requests a probe of ``rate`` a minute sends in ``duration_s``; never too few."""
    return max(MIN_REQUESTS, math.ceil(rate * duration_s / 60))


def is_hopeless(latencies: Sequence[float], planned: int, slo_s: float) -> bool:
    """Whether so many requests already took too long that p95 cannot be below the limit."""
    allowed = planned - math.ceil(0.95 * planned)
    return sum(seconds >= slo_s for seconds in latencies) > allowed
