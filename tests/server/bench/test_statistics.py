"""Intervals hold what they should as often as they say, and are no wider than they need be."""

import math

import numpy as np
import pytest

from redux_server.bench.statistics import Latencies, min_count, percentile, ratio, students_t


def drawn(rng: np.random.Generator, count: int, median: float, blocks: int, hour: float = 0.0):
    """Lognormal latencies; ``hour`` is how much a whole block is slower or faster."""
    block = np.repeat(np.arange(blocks), count // blocks)
    logs = rng.normal(math.log(median), 0.25, len(block)) + rng.normal(0, hour, blocks)[block]
    return Latencies.of(np.exp(logs).tolist(), block.tolist())


@pytest.mark.parametrize(("blocks", "hour"), [(2, 0.0), (10, 0.0), (10, 0.2)])
def test_an_interval_of_a_median_holds_the_truth(blocks: int, hour: float) -> None:
    rng = np.random.default_rng(7)
    held = 0
    for seed in range(60):
        found = percentile(drawn(rng, 60, 3.0, blocks, hour), 50, seed)
        held += found.low <= 3.0 <= found.high
    assert held >= 55  # 57 are expected of exactly 95 %


def test_requests_alone_would_promise_too_much_where_the_hour_counts() -> None:
    """The same numbers, their blocks forgotten: that is what blocks are resampled for."""
    rng = np.random.default_rng(7)
    held = 0
    for seed in range(60):
        seen = drawn(rng, 60, 3.0, 10, 0.2)
        found = percentile(Latencies.of(seen.seconds.tolist(), [0] * 60), 50, seed)
        held += found.low <= 3.0 <= found.high
    assert held < 50


def test_a_ratio_is_the_inverse_of_the_other_way_round() -> None:
    rng = np.random.default_rng(1)
    one, two = drawn(rng, 200, 1.0, 1), drawn(rng, 200, 2.0, 1)
    there, back = ratio(two, one, 50), ratio(one, two, 50)
    assert there.value == pytest.approx(1 / back.value)
    assert there.low == pytest.approx(1 / back.high, rel=0.03)
    assert there.high / there.low < 1.4


def test_percentiles_are_numpys() -> None:
    seconds = [1.0, 2.0, 4.0, 8.0]
    assert percentile(Latencies.of(seconds, [0] * 4), 50).value == pytest.approx(math.sqrt(8))
    assert percentile(Latencies.of([3.0], [0]), 99).low == pytest.approx(3.0)
    with pytest.raises(ValueError, match="nothing to estimate"):
        percentile(Latencies.of([], []), 50)


def test_students_t_is_that_of_the_tables() -> None:
    for degrees, value in ((4, 2.776), (9, 2.262), (19, 2.093), (1000, 1.962)):
        assert students_t(degrees) == pytest.approx(value, rel=0.01)


def test_how_many_samples_a_percentile_needs() -> None:
    for percent in (50, 95, 99):
        count = min_count(percent)
        assert (percent / 100) ** count <= 0.025 < (percent / 100) ** (count - 1)


def test_very_many_samples_take_no_more_memory_than_few() -> None:
    import tracemalloc

    seen = Latencies.of(np.random.default_rng(0).lognormal(0, 0.3, 200_000).tolist(), [0] * 200_000)
    tracemalloc.start()
    found = percentile(seen, 50)
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    assert found.low < 1 < found.high
    assert found.high / found.low < 1.01
