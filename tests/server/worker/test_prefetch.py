"""Who may be claimed while others are fetched, who has the device next, whose pictures wait."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from e2e.live import wait_until
from redux_server.worker.prefetch import (
    AHEAD,
    SLOW,
    SLOW_OF_A_KEY,
    UNSTORED,
    Claimable,
    DeviceQueue,
    FetchTurns,
    Place,
    Prefetch,
)


def place(prefetch: Prefetch, *keys: str, priority: int = 0) -> Place:
    """A group of these keys ahead of the device."""
    taken = prefetch.take()
    taken.hold(keys, priority)
    return taken


def slow(prefetch: Prefetch, *keys: str) -> Place:
    taken = place(prefetch, *keys)
    assert taken.fetch_on(keys)
    return taken


@contextmanager
def beside(*targets: threading.Thread) -> Iterator[None]:
    for thread in targets:
        thread.start()
    yield
    for thread in targets:
        thread.join(20)
        assert not thread.is_alive()


# --- what may be claimed --------------------------------------------------------------------------


def test_who_waits_for_the_device_has_no_second_group_there() -> None:
    prefetch = Prefetch()
    first = place(prefetch, "a", "b", priority=3)
    assert prefetch.claimable() == Claimable(frozenset("ab"), 3)
    first.begin()
    assert prefetch.claimable() == Claimable()
    first.leave()
    assert prefetch.claimable() == Claimable()


def test_groups_ahead_are_few_and_the_next_waits_for_one_to_begin() -> None:
    prefetch = Prefetch()
    first, *_ = (place(prefetch, str(number)) for number in range(AHEAD))
    taken: list[Place] = []
    with beside(threading.Thread(target=lambda: taken.append(prefetch.take()))):
        assert not taken
        first.begin()
    assert len(taken) == 1


def test_slow_group_makes_room_and_a_key_has_few_of_them() -> None:
    prefetch = Prefetch()
    for _ in range(SLOW_OF_A_KEY):
        assert prefetch.claimable().without == frozenset()
        slow(prefetch, "slow")
    assert prefetch.claimable() == Claimable(frozenset({"slow"}))


def test_where_many_are_slow_their_keys_have_no_more_and_others_are_claimed() -> None:
    prefetch = Prefetch()
    for number in range(SLOW):
        slow(prefetch, f"slow {number}")
    assert prefetch.claimable().without == {f"slow {number}" for number in range(SLOW)}
    one_more = place(prefetch, "other")
    assert not one_more.fetch_on(["other"])
    assert "other" in prefetch.claimable().without


def test_slow_group_whose_pictures_have_come_counts_as_ahead() -> None:
    prefetch = Prefetch()
    late = slow(prefetch, "slow")
    late.wait()
    assert prefetch.claimable() == Claimable(frozenset({"slow"}), 0)


def test_those_who_claim_are_told_of_what_may_be_claimed_since() -> None:
    changes: list[str] = []
    prefetch = Prefetch(lambda: changes.append("changed"))
    first = place(prefetch, "a")
    first.wait()
    assert changes == [], "nothing has become free"
    first.begin()
    first.leave()
    assert len(changes) == 1
    slow(prefetch, "b").leave()
    assert len(changes) == 3


def test_nobody_waits_for_a_place_after_the_stop() -> None:
    prefetch = Prefetch()
    for number in range(AHEAD):
        place(prefetch, str(number))
    with beside(threading.Thread(target=prefetch.take)):
        prefetch.stop()


# --- the device -----------------------------------------------------------------------------------


def served(queue: DeviceQueue, *waiting: tuple[str, int]) -> list[str]:
    """In which order groups have the device that all wait for it: of each the key, the priority."""
    order: list[str] = []

    def work(key: str, priority: int) -> None:
        with queue.unstored(), queue.turn(frozenset([key]), priority):
            order.append(key)

    threads = [threading.Thread(target=work, args=each) for each in waiting]
    with queue.unstored(), queue.turn(frozenset(["first"]), 0):
        for count, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda count=count: len(queue._waiting) == count, 10)  # type: ignore[misc]
    for thread in threads:
        thread.join(20)
    return order


def test_key_that_had_the_device_longest_ago_is_next() -> None:
    ticks = iter(range(100))
    queue = DeviceQueue(clock=lambda: next(ticks))
    assert served(queue, ("a", 0), ("b", 0)) == ["a", "b"]
    assert served(queue, ("b", 0), ("a", 0), ("new", 0)) == ["new", "a", "b"]


def test_flood_of_one_key_is_passed_by_another() -> None:
    queue = DeviceQueue()
    order = served(queue, *[("flood", 0)] * 3, ("late", 0))
    assert order.index("late") <= 1


def test_higher_priority_goes_first_whoever_had_the_device() -> None:
    ticks = iter(range(100))
    queue = DeviceQueue(clock=lambda: next(ticks))
    assert served(queue, ("a", 0), ("vip", 5), ("vip", 5)) == ["vip", "vip", "a"]


def test_device_waits_for_images_to_be_stored() -> None:
    queue = DeviceQueue()
    stored = [threading.Event() for _ in range(UNSTORED)]
    begun: list[int] = []

    def work(number: int) -> None:
        with queue.unstored():
            with queue.turn(frozenset("k"), 0):
                begun.append(number)
            if number < UNSTORED:
                assert stored[number].wait(20)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(UNSTORED + 1)]
    for number, thread in enumerate(threads):
        thread.start()
        if number < UNSTORED:
            wait_until(lambda number=number: len(begun) == number + 1, 10)  # type: ignore[misc]
    assert len(begun) == UNSTORED
    stored[0].set()
    wait_until(lambda: len(begun) == UNSTORED + 1, 10)
    for event in stored:
        event.set()
    for thread in threads:
        thread.join(20)


# --- pictures -------------------------------------------------------------------------------------


def test_turns_of_a_key_are_few_and_leave_some_to_others() -> None:
    turns = FetchTurns(in_all=3, of_a_key=2)
    go_on = threading.Event()
    begun: list[str] = []

    def fetch(key: str) -> None:
        with turns.turn(key):
            begun.append(key)
            assert go_on.wait(20)

    threads = [threading.Thread(target=fetch, args=(key,)) for key in ("slow", "slow", "slow")]
    for thread in threads:
        thread.start()
    wait_until(lambda: begun == ["slow", "slow"], 10)
    other = threading.Thread(target=fetch, args=("other",))
    other.start()
    wait_until(lambda: begun == ["slow", "slow", "other"], 10)
    go_on.set()
    for thread in (*threads, other):
        thread.join(20)
    assert len(begun) == 4
    assert not turns._running
