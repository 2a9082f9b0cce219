"""The watch on the device, with a clock to turn: what it learns, and when it loses patience."""

import subprocess
import sys
import threading

import pytest

from redux_server.worker.watchdog import (
    FACTOR,
    LEAST_NEW_S,
    LEAST_S,
    TICK_S,
    UNKNOWN_S,
    Watchdog,
)
from server.in_process import Clock

SMALL = 512 * 512


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def watchdog(clock: Clock) -> Watchdog:
    return Watchdog(clock=clock)


def pass_time(watchdog: Watchdog, clock: Clock, seconds: float) -> str | None:
    """Tick like the thread does; the first complaint, if any."""
    for _ in range(round(seconds / TICK_S)):
        clock.now += TICK_S
        if (reason := watchdog.tick()) is not None:
            return reason
    return None


def run(watchdog: Watchdog, clock: Clock, *steps: float, shape: str = "a", pixels: int = SMALL):
    with watchdog.watching(shape, pixels):
        for seconds in steps:
            assert pass_time(watchdog, clock, seconds) is None
            watchdog.step()


def limit(watchdog: Watchdog, shape: str = "a", pixels: int = SMALL) -> float | None:
    """That of a first step."""
    with watchdog.watching(shape, pixels):
        return watchdog.limit_s


def test_nothing_hangs_while_there_is_nothing_to_do(watchdog: Watchdog, clock: Clock) -> None:
    run(watchdog, clock, 1.0)
    assert pass_time(watchdog, clock, 10_000) is None
    assert (watchdog.limit_s, watchdog.waited_s) == (None, 0.0)


def test_a_first_step_of_all_may_take_very_long(watchdog: Watchdog, clock: Clock) -> None:
    with watchdog.watching("a", SMALL):
        assert pass_time(watchdog, clock, UNKNOWN_S) is None
        reason = pass_time(watchdog, clock, 2.0)
    assert reason is not None and "no step for 1800 s" in reason and "--step-timeout-s" in reason


def test_quick_steps_leave_the_least_limits(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.learn(SMALL, 0.1)
    assert limit(watchdog, "new") == LEAST_NEW_S
    run(watchdog, clock, 0.5, 0.5)
    with watchdog.watching("a", SMALL):
        assert pass_time(watchdog, clock, 1.0) is None
        watchdog.step()
        assert pass_time(watchdog, clock, LEAST_S) is None, "each step has its own time"
        assert pass_time(watchdog, clock, 1.0) is not None


def test_slow_steps_raise_the_limit_by_the_pixels(watchdog: Watchdog, clock: Clock) -> None:
    run(watchdog, clock, 3.0)
    run(watchdog, clock, 10.0)  # a known shape's
    assert limit(watchdog) == pytest.approx(FACTOR * 10.0, abs=FACTOR)
    run(watchdog, clock, 1.0, shape="b", pixels=4 * SMALL)
    assert limit(watchdog, "b", 4 * SMALL) == pytest.approx(FACTOR * 40.0, abs=4 * FACTOR)


def test_what_a_first_time_took_is_no_measure_of_the_next(watchdog: Watchdog, clock: Clock) -> None:
    run(watchdog, clock, 120.0)  # it compiled
    assert limit(watchdog) == LEAST_S
    new = limit(watchdog, "b")
    assert new == pytest.approx(FACTOR * 120.0, abs=FACTOR), "another one may compile as long"


def test_a_shape_that_failed_is_still_new(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.learn(SMALL, 0.1)
    with pytest.raises(RuntimeError), watchdog.watching("a", SMALL):
        raise RuntimeError
    assert limit(watchdog) == LEAST_NEW_S
    assert watchdog.limit_s is None


def test_a_given_limit_is_that_of_every_step(clock: Clock) -> None:
    watchdog = Watchdog(limit_s=2.0, clock=clock)
    with watchdog.watching("a", SMALL):
        assert pass_time(watchdog, clock, 2.0) is None
        assert pass_time(watchdog, clock, 0.5) is not None


def test_a_frozen_process_is_no_device_that_hangs(clock: Clock) -> None:
    watchdog = Watchdog(limit_s=10.0, clock=clock)
    with watchdog.watching("a", SMALL):
        assert pass_time(watchdog, clock, 5.0) is None
        clock.now += 3600
        assert watchdog.tick() is None
        watchdog.step()
    assert watchdog._slowest_new * SMALL < 10.0, "and nothing is learned from it"


def test_it_is_said_once_and_from_another_thread() -> None:
    watchdog, has_ended, reasons = Watchdog(limit_s=0.1), threading.Event(), []
    keep = threading.Thread(
        target=watchdog.keep, args=(has_ended, reasons.append), kwargs={"ends_process": False}
    )
    keep.start()
    with watchdog.watching("a", SMALL):
        keep.join(10)
    assert not keep.is_alive() and len(reasons) == 1


HOLDS_THE_LOCK = """
import ctypes, threading
from redux_server.worker import watchdog
watchdog._GIL_S = 0.5 - 600  # what the interpreter's own watchdog waits beyond the limit
watch = watchdog.Watchdog(limit_s=600)
threading.Thread(
    target=watch.keep, args=(threading.Event(), print), kwargs={"ends_process": True}, daemon=True
).start()
with watch.watching("a", 1):
    while watch.waited_s == 0:
        threading.Event().wait(0.05)
    threading.Event().wait(0.3)
    ctypes.PyDLL(None).sleep(60)  # no other thread of Python runs meanwhile
"""


def test_what_hangs_and_holds_the_interpreters_lock_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK], capture_output=True, text=True, timeout=50,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in <module>" in done.stderr  # where it was stuck
