"""Percentiles, ratios and their 95 % intervals, by bootstrap (Efron 1979).

The requests of one run are resampled. Where the run has five blocks or more, blocks are resampled
too (a cluster bootstrap), because what the hour does to a block it does to all of its requests; of
the two intervals the wider one is taken. Everything is computed on logarithms: latencies are
positive and skewed, and a ratio's interval is then the same for A/B as for B/A.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_FEWEST = 200
_NUMBERS = 4_000_000
MIN_BLOCKS = 5
PERCENTILES = (50, 95, 99)
_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def told(self) -> dict[str, Any]:
        """As reports have it."""
        return {"value": _rounded(self.value), "ci95": [_rounded(self.low), _rounded(self.high)]}


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds, none of them 0, and the block of each."""

    seconds: Floats
    block: NDArray[np.int64]

    @classmethod
    def of(cls, seconds: Sequence[float], block: Sequence[int]) -> "Latencies":
        """From lists of one length."""
        return cls(np.maximum(np.asarray(seconds, float), 1e-9), np.asarray(block, np.int64))

    def __len__(self) -> int:
        """How many there are."""
        return len(self.seconds)


def percentile(latencies: Latencies, percent: float, seed: int = 0) -> Estimate:
    """A percentile of latencies in seconds, with linear interpolation between neighbours.

    Raises:
        ValueError: there are none.
    """
    return _estimate([latencies], lambda logs: np.percentile(logs[0], percent, axis=-1), seed)


def ratio(above: Latencies, below: Latencies, percent: float, seed: int = 0) -> Estimate:
    """A percentile of ``above`` divided by that of ``below``.

    Raises:
        ValueError: there are none of either.
    """

    def statistic(logs: Sequence[Floats]) -> Floats:
        up, down = (np.percentile(each, percent, axis=-1) for each in logs)
        return np.asarray(up - down)

    return _estimate([above, below], statistic, seed)


def students_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, by Abramowitz and Stegun 26.7.5 (1 % off at 4)."""
    z, v = _Z, float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def min_count(percent: float) -> int:
    """How many samples an interval of this percentile needs: below, its upper end is a guess.

    The largest of n samples is above the p-quantile with a probability of 1 - p^n; 97.5 % of that
    is what the upper end of a 95 % interval takes.
    """
    return math.ceil(math.log(0.025) / math.log(percent / 100))


Statistic = Callable[[Sequence[Floats]], Any]


def _estimate(groups: Sequence[Latencies], statistic: Statistic, seed: int) -> Estimate:
    if not all(len(group) for group in groups):
        raise ValueError("there is nothing to estimate from")
    rng = np.random.default_rng(seed)
    logs = [np.log(group.seconds) for group in groups]
    value = float(statistic(logs))
    low, high = np.percentile(_resampled(logs, statistic, rng), (2.5, 97.5))
    by_block = _half_width_by_block(groups, logs, statistic, rng)
    low, high = min(low, value - by_block), max(high, value + by_block)
    return Estimate(math.exp(value), math.exp(low), math.exp(high))


def _resampled(logs: Sequence[Floats], statistic: Statistic, rng: np.random.Generator) -> Floats:
    """The statistic of resampled values: fewer times where there are many, and some at a time."""
    most = max(map(len, logs))
    count = max(_FEWEST, min(RESAMPLES, _NUMBERS // most))
    at_once = max(1, _NUMBERS // 4 // most)
    found = []
    for first in range(0, count, at_once):
        rows = min(at_once, count - first)
        drawn = [each[rng.integers(0, len(each), (rows, len(each)))] for each in logs]
        found.append(statistic(drawn))
    return np.concatenate(found)


def _half_width_by_block(
    groups: Sequence[Latencies], logs: Sequence[Floats], statistic: Statistic, rng: Any
) -> float:
    """Student's t times the standard error between blocks; 0 where there are too few of them.

    Groups that share their blocks are resampled together: so an hour that is slow for both cancels
    out of a ratio.
    """
    shared = sorted(set.intersection(*(set(group.block.tolist()) for group in groups)))
    if len(shared) < MIN_BLOCKS:
        return 0.0
    parts = [
        [each[group.block == block] for block in shared]
        for group, each in zip(groups, logs, strict=True)
    ]
    values = []
    for _ in range(200):
        chosen = rng.integers(0, len(shared), len(shared))
        values.append(float(statistic([np.concatenate([p[i] for i in chosen]) for p in parts])))
    spread = float(np.std(values)) * math.sqrt(len(shared) / (len(shared) - 1))
    return students_t(len(shared) - 1) * spread


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
