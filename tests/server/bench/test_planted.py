"""Planted truths: what is known of the imitated services is what a run says of them."""

import heapq
import math
import random
from itertools import pairwise

import pytest

from redux_server.bench.load import arrival_times
from redux_server.bench.quality import Quality
from redux_server.bench.statistics import ratio
from redux_server.bench.summary import measured as latencies_of
from redux_server.bench.summary import summarise
from server.bench.hosted import Hosted
from server.bench.runs import measured


def scaled(seconds: float, spread: float = 0.25):
    """Work that takes ``seconds`` at the median."""
    return lambda rng: seconds * math.exp(rng.gauss(0, spread))


@pytest.mark.parametrize("runs", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_the_ratio_of_a_target_twice_as_slow_holds_two_in_93_of_100_runs(runs: int) -> None:
    hits = 0
    for seed in range(runs):
        hosted = {
            "A": Hosted(scaled(1.5), seed=2 * seed),
            "B": Hosted(scaled(3.0), seed=2 * seed + 1),
        }
        _, seen = measured(hosted, images=16, clients=2, seed=seed)
        found = ratio(latencies_of(seen.of("B")), latencies_of(seen.of("A")), 50)
        hits += found.low <= 2 <= found.high
        assert found.high / found.low < 2.5, "an interval so wide would hold anything"
    assert hits >= 0.93 * runs


def test_equal_targets_are_told_apart_in_few_runs() -> None:
    wrong = 0
    for seed in range(30):
        hosted = {
            "A": Hosted(scaled(1.5), seed=2 * seed),
            "B": Hosted(scaled(1.5), seed=2 * seed + 1),
        }
        _, seen = measured(hosted, options={"mode": "sync"}, images=24, seed=seed)
        found = ratio(latencies_of(seen.of("B")), latencies_of(seen.of("A")), 50)
        wrong += not found.low <= 1 <= found.high
    assert wrong <= 3


def test_the_hour_falls_on_all_targets_alike() -> None:
    """Both become slower and slower: asked one after the other, the second would look worse."""

    class Tiring(Hosted):
        def _ready_at(self, now: float) -> float:
            return super()._ready_at(now) + now / 100

    hosted = {"A": Tiring(scaled(1, 0.05)), "B": Tiring(scaled(1, 0.05), seed=1)}
    _, seen = measured(hosted, images=60)
    found = ratio(latencies_of(seen.of("B")), latencies_of(seen.of("A")), 50)
    assert found.low <= 1 <= found.high
    assert max(each.latency_s or 0 for each in seen.of("A")) > 2


STALLED = {"service_s": lambda _: 0.05, "workers": 4, "stall": (8.0, 10.0)}


def test_a_stall_of_two_seconds_is_seen_by_the_open_loop_and_missed_by_the_closed_one() -> None:
    plan, seen = measured({"A": Hosted(**STALLED)}, images=1200, clients=4)
    closed = summarise(plan, seen, Quality())["targets"]["A"]["latency_s"]["p99"]["value"]
    assert closed < 0.1, "four of thousands of requests noticed"
    assert max(each.latency_s or 0 for each in seen.samples) > 1.5

    plan, seen = measured({"A": Hosted(**STALLED)}, images=1200, rate=1200, arrivals="poisson")
    opened = summarise(plan, seen, Quality())["targets"]["A"]["latency_s"]["p99"]["value"]
    assert opened > 1.0, "2 s in which 40 arrived, of 1200"


def test_time_counts_from_the_scheduled_start() -> None:
    """Arrivals at 1/s, work of 2 s, one at a time: request i waits i seconds longer."""
    _, seen = measured({"A": Hosted(lambda _: 2.0, workers=1)}, images=20, rate=60, arrivals="even")
    for sample in seen.samples:
        assert sample.latency_s == pytest.approx(2 + sample.index, rel=0.06)


def knee_of(hosted: Hosted, **plan: object) -> tuple[float, dict[str, object]]:
    options = {"mode": "sync"}  # without polls, for they take time
    made, seen = measured({"A": hosted}, options=options, images=5000, has_knee=True, **plan)
    told = summarise(made, seen, Quality())
    return told["targets"]["A"]["knee"]["images_per_minute"], told["targets"]["A"]


@pytest.mark.parametrize("workers", [1, 4])
def test_a_knee_planted_at_40_images_a_minute_is_found_within_10_percent(workers: int) -> None:
    hosted = Hosted(scaled(1.5 * workers, 0.05), workers=workers)
    knee, told = knee_of(hosted, slo_s=10.0, arrivals="even")
    assert knee == pytest.approx(40, rel=0.1)
    assert told["knee"]["goodput_per_minute"] == pytest.approx(knee, rel=0.05)  # type: ignore[index]


def true_p95_of_random_arrivals(rate: float, work_s: float, count: int = 60_000) -> float:
    """By the queue's own recursion (Lindley), independent of the bench: work is constant."""
    waiting, latencies = 0.0, []
    times = arrival_times(rate, count, "poisson", seed=99)
    for before, now in pairwise(times):
        waiting = max(0.0, waiting + work_s - (now - before))
        latencies.append(waiting + work_s)
    return heapq.nsmallest(int(len(latencies) * 0.95), latencies)[-1]


def test_the_knee_of_random_arrivals_is_where_p95_crosses_the_limit() -> None:
    low, high = 1.0, 40.0
    while high - low > 0.3:
        middle = (low + high) / 2
        low, high = (
            (middle, high) if true_p95_of_random_arrivals(middle, 1.5) < 10 else (low, middle)
        )
    found = [
        knee_of(Hosted(lambda _: 1.5, workers=1), arrivals="poisson", duration_s=900.0, seed=seed)[
            0
        ]
        for seed in range(3)
    ]
    assert sorted(found)[1] == pytest.approx(low, rel=0.12)
    assert low < 36, "random users are carried at a lower rate than a steady stream"


def test_a_service_that_is_always_too_slow_has_no_knee() -> None:
    made, seen = measured({"A": Hosted(lambda _: 12.0)}, images=300, has_knee=True, slo_s=10.0)
    told = summarise(made, seen, Quality())
    assert told["targets"]["A"]["knee"] is None
    assert any("no rate was found" in text for text in told["findings"])


def test_the_search_asks_for_no_more_images_than_it_may() -> None:
    hosted = Hosted(scaled(1.5), workers=1)
    _, seen = measured({"A": hosted}, images=90, has_knee=True)
    assert len(hosted.submits) == len(seen.samples) <= 90


def test_random_is_used_with_seeds_only() -> None:
    random.seed(1)
    first = measured({"A": Hosted(scaled(1))}, images=10)[1].samples
    random.seed(2)
    assert [each.latency_s for each in first] == [
        each.latency_s for each in measured({"A": Hosted(scaled(1))}, images=10)[1].samples
    ]
