"""The token buckets, against counting by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redux_server.api import limits
from redux_server.api.limits import RateLimit
from server.in_process import Clock


def passes(limit: RateLimit, key: str, tries: int) -> int:
    return sum(limit.take(key) == 0 for _ in range(tries))


def test_no_limit_lets_everything_through(clock: Clock) -> None:
    assert passes(RateLimit(0, clock=clock), "a", 10_000) == 10_000


def test_a_minutes_worth_may_come_at_once_and_no_more(clock: Clock) -> None:
    limit = RateLimit(6, clock=clock)
    assert passes(limit, "a", 50) == 6
    clock.now += 9.9
    assert limit.take("a") == pytest.approx(0.1)
    clock.now += 0.2
    assert passes(limit, "a", 50) == 1


def test_rest_does_not_add_up_beyond_a_minutes_worth(clock: Clock) -> None:
    limit = RateLimit(6, clock=clock)
    passes(limit, "a", 6)
    clock.now += 3600
    assert passes(limit, "a", 50) == 6


def test_keys_do_not_share(clock: Clock) -> None:
    limit = RateLimit(2, clock=clock)
    assert passes(limit, "a", 9) == 2
    assert passes(limit, "b", 9) == 2


@given(
    per_minute=st.integers(1, 600),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 40)), max_size=30),
)
def test_no_run_of_requests_beats_the_rate(per_minute: int, steps: list[tuple[float, int]]) -> None:
    clock = Clock(0.0)
    limit = RateLimit(per_minute, clock=clock)
    passed = 0
    for pause_s, tries in steps:
        clock.now += pause_s
        passed += passes(limit, "a", tries)
        assert passed <= per_minute + clock.now * per_minute / 60 + 1e-6


def test_waiting_as_long_as_told_is_enough(clock: Clock) -> None:
    limit = RateLimit(7, clock=clock)
    passes(limit, "a", 7)
    for _ in range(20):
        clock.now += limit.take("a") + 1e-6
        assert limit.take("a") == 0


def test_full_buckets_are_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_PRUNE_ABOVE", 100)
    limit = RateLimit(2, clock=clock)
    for number in range(100):
        limit.take(f"old {number}")
    clock.now += 60
    passes(limit, "young", 9)
    assert list(limit._buckets) == ["young"]
    passes(limit, "another", 9)
    assert passes(limit, "young", 9) == 0, "a used one is kept"
