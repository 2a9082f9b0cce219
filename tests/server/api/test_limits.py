"""Reserved places, and the token buckets, against counting by hand."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redux_server.api import limits
from redux_server.api.limits import QueueReservations, RateLimit
from redux_server.tasks.task import FreePlaces, KeyFull, NoRoom
from server.in_process import Clock

# --- reservations ---------------------------------------------------------------------------------


class Queue:
    """Places that are set by hand; ``counts`` is how often they were counted."""

    def __init__(self, of_all: int, of_key: int = 10**9) -> None:
        self.left = FreePlaces(of_all, of_key)
        self.counts = 0

    def __call__(self, key_ids: Sequence[str]) -> Sequence[FreePlaces]:
        self.counts += 1
        return [self.left] * len(key_ids)


def run(queue: Queue, scene: Callable[[QueueReservations], Any], **more: Any) -> None:
    """``scene`` over the reservations of ``queue``; none is left afterwards."""

    async def whole() -> None:
        reservations = QueueReservations(queue, **more)
        try:
            await scene(reservations)
            assert not reservations._reserved
        finally:
            reservations.close()

    asyncio.run(whole())


async def ask(reservations: QueueReservations, key_id: str) -> NoRoom | KeyFull | None:
    with reservations.hold(key_id) as place:
        return await place.reserve()


@pytest.mark.parametrize(
    ("left", "says"),
    [((0, 5), NoRoom()), ((5, 0), KeyFull()), ((-1, -1), KeyFull()), ((1, 1), None)],
)
def test_what_is_full_is_named(left: tuple[int, int], says: Any) -> None:
    async def scene(reservations: QueueReservations) -> None:
        assert await ask(reservations, "a") == says

    run(Queue(*left), scene)


def test_who_never_asks_counts_nothing() -> None:
    queue = Queue(1)

    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a"):
            assert await asyncio.wait_for(ask(reservations, "b"), 5) is None

    run(queue, scene)
    assert queue.counts == 1


@pytest.mark.parametrize(("waited_s", "counts"), [(0.9, 1), (1.1, 2)])
def test_count_of_a_look_stands_for_the_reservation_while_it_is_fresh(
    waited_s: float, counts: int, clock: Clock
) -> None:
    queue = Queue(1)

    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a") as place:
            assert await place.look() is None
            assert not reservations._reserved
            clock.now += waited_s
            assert await place.reserve() is None
            assert reservations._reserved == {"a": 1}

    run(queue, scene, clock=clock)
    assert queue.counts == counts


def test_place_that_was_only_looked_for_is_free_for_others() -> None:
    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("slow") as slow, reservations.hold("slow too") as slow_too:
            assert await slow.look() is await slow_too.look() is None
            assert await asyncio.wait_for(ask(reservations, "quick"), 5) is None

    run(Queue(1), scene)


def test_place_that_another_took_since_the_look_is_waited_for_and_counted_anew() -> None:
    queue = Queue(1)

    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a") as slow:
            assert await slow.look() is None
            with reservations.hold("b") as quick:
                assert await quick.reserve() is None
                waiting = asyncio.create_task(slow.reserve())
                await asyncio.sleep(0.05)
                assert not waiting.done()
                queue.left = FreePlaces(0, 9)  # the quick one has been accepted
            assert await asyncio.wait_for(waiting, 20) == NoRoom()

    run(queue, scene)


def test_look_waits_for_nobody() -> None:
    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a") as first, reservations.hold("b") as second:
            assert await first.reserve() is None
            assert await asyncio.wait_for(second.look(), 5) is None

    run(Queue(1), scene)


@pytest.mark.parametrize("then", [None, NoRoom()])
def test_who_finds_reserved_places_waits_for_what_becomes_of_them(then: NoRoom | None) -> None:
    queue = Queue(1)

    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a") as place:
            assert await place.reserve() is None
            waiting = asyncio.create_task(ask(reservations, "b"))
            while queue.counts < 2:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert not waiting.done()
            if then is not None:
                queue.left = FreePlaces(0, 9)
        assert await asyncio.wait_for(waiting, 20) == then

    run(queue, scene)


def test_count_that_is_older_than_the_end_of_a_reservation_is_not_believed() -> None:
    counted, may_tell = threading.Event(), threading.Event()

    class Slow(Queue):
        def __call__(self, key_ids: Sequence[str]) -> Sequence[FreePlaces]:
            found = super().__call__(key_ids)
            if self.counts == 2:
                counted.set()
                may_tell.wait(20)
            return found

    queue = Slow(1)

    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a") as place:
            assert await place.reserve() is None
            waiting = asyncio.create_task(ask(reservations, "b"))
            await asyncio.to_thread(counted.wait, 20)
            queue.left = FreePlaces(0, 9)  # the first has been accepted
        may_tell.set()
        assert await asyncio.wait_for(waiting, 20) == NoRoom()

    run(queue, scene)
    assert queue.counts == 3


def test_places_of_other_keys_are_not_waited_for() -> None:
    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a") as place:
            assert await place.reserve() is None
            assert await asyncio.wait_for(ask(reservations, "b"), 20) is None

    run(Queue(5, 1), scene)


def test_request_that_is_given_up_frees_its_place() -> None:
    async def scene(reservations: QueueReservations) -> None:
        async def never() -> None:
            with reservations.hold("a") as place:
                await place.reserve()
                await asyncio.Event().wait()

        given_up = asyncio.create_task(never())
        while not reservations._reserved:
            await asyncio.sleep(0.001)
        given_up.cancel()
        assert await asyncio.wait_for(ask(reservations, "a"), 20) is None

    run(Queue(1), scene)


# --- rates ----------------------------------------------------------------------------------------


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
