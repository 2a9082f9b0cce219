"""When requests are sent."""

import statistics
from itertools import pairwise

import pytest

from redux_server.bench.load import arrival_times, blocks


@pytest.mark.parametrize(
    ("arrivals", "burstiness", "variation"),
    [("even", 1.0, 0.0), ("poisson", 9.0, 1.0), ("gamma", 2.0, 2.0), ("gamma", 0.5, 0.5)],
)
def test_arrivals_have_their_rate_and_their_variation(
    arrivals: str, burstiness: float, variation: float
) -> None:
    times = arrival_times(30, 20_000, arrivals, burstiness, seed=3)
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(2.0, rel=0.04)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(
        variation, rel=0.04, abs=1e-6
    )
    assert times[0] == 0


def test_arrivals_are_the_same_for_the_same_seed() -> None:
    assert arrival_times(30, 50, "poisson", seed=1) == arrival_times(30, 50, "poisson", seed=1)
    assert arrival_times(30, 50, "poisson", seed=1) != arrival_times(30, 50, "poisson", seed=2)


@pytest.mark.parametrize(("count", "block"), [(1, 20), (20, 4), (21, 4), (100, 7), (3, 1)])
def test_blocks_hold_each_request_once(count: int, block: int) -> None:
    held = [index for first, size in blocks(count, block) for index in range(first, first + size)]
    assert held == list(range(count))
    assert max(size for _, size in blocks(count, block)) <= 2 * block
