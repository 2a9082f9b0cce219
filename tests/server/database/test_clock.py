"""Time comes from the database where machines share one, and a date that jumped is doubted."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import OperationalError

from redux_server.database.clock import (
    ClockGuard,
    DatabaseClock,
    clock_of,
    jump_since_believed,
)
from redux_server.database.migration import open_database
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask
from server.in_process import Clock


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Engine]:
    engine = open_database(postgres_url)
    yield engine
    engine.dispose()


HOUR = 3600.0


def at_once(function: Callable[[], None]) -> None:
    function()


class Steady:
    """Seconds that pass only when told, whatever the date is."""

    now = 5000.0

    def __call__(self) -> float:
        return self.now


def test_one_machine_uses_its_own_clock(database: Engine) -> None:
    assert clock_of(database) is time.time


@pytest.mark.cluster
def test_a_machine_whose_date_is_wrong_goes_by_the_databases(
    postgres: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgres.connect() as db:
        there = float(db.scalar(text("SELECT extract(epoch FROM clock_timestamp())")) or 0)
    monkeypatch.setattr(time, "time", lambda: there + 3600)
    clock = clock_of(postgres)
    assert 0 <= clock() - there < 60


@pytest.mark.cluster
def test_it_is_asked_once_a_minute_and_carried_on_between(postgres: Engine) -> None:
    asked: list[str] = []
    event.listen(postgres, "before_cursor_execute", lambda *given: asked.append(given[2]))
    steady = Steady()
    clock = DatabaseClock(postgres, steady=steady, beside=at_once)
    first = clock()
    steady.now += 59
    assert clock() == first + 59
    assert len(asked) == 1
    steady.now += 2
    clock()
    assert abs(clock() - first) < 30  # the database says that no minute has passed
    assert len(asked) == 2


@pytest.mark.cluster
def test_while_the_database_is_away_time_goes_on_and_it_is_asked_again(
    postgres: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady, tries = Steady(), [0]
    clock = DatabaseClock(postgres, steady=steady, beside=at_once)
    first = clock()

    def away(_self: DatabaseClock) -> float:
        tries[0] += 1
        raise OperationalError("SELECT", {}, Exception("away"))

    with monkeypatch.context() as patch:
        patch.setattr(DatabaseClock, "_measure", away)
        steady.now += 61
        assert clock() == clock() == first + 61
        assert tries == [1]  # and not at every call
        steady.now += 6
        assert clock() == first + 67
        assert tries == [2]
    steady.now += 6
    clock()
    assert abs(clock() - first) < 30


@pytest.mark.cluster
def test_whoever_asks_for_the_time_waits_for_no_database(postgres: Engine) -> None:
    steady, asked = Steady(), threading.Event()
    clock = DatabaseClock(postgres, steady=steady)
    first = clock()
    answers = threading.Event()

    def silent(*_: object) -> None:
        asked.set()
        answers.wait(20)

    event.listen(postgres, "before_cursor_execute", silent)
    steady.now += 61
    assert clock() == first + 61
    assert asked.wait(10)
    assert clock() == first + 61
    answers.set()
    for thread in threading.enumerate():
        if thread.name == "clock":
            thread.join(20)  # it has a connection, which is to be closed with the others


# --- Whether the date can be believed -------------------------------------------------------------


class Bench:
    """A guard over a date and a steady clock to turn; ``restart`` is another process."""

    def __init__(self, database: Engine) -> None:
        self.database = database
        self.date, self.steady = Clock(), Steady()
        self.restart()

    def restart(self) -> None:
        self.guard = ClockGuard(self.database, clock=self.date, steady=self.steady)

    def pass_(self, seconds: float) -> None:
        self.date.now += seconds
        self.steady.now += seconds


@pytest.fixture
def bench(either_database: Engine) -> Bench:
    return Bench(either_database)


def test_a_date_that_goes_on_is_believed(bench: Bench) -> None:
    for _ in range(3):
        assert bench.guard.believes()
        bench.pass_(300)
    bench.pass_(20 * HOUR)  # the server was off overnight
    bench.restart()
    assert bench.guard.believes()


@pytest.mark.parametrize("jump_s", [8 * 24 * HOUR, 25 * HOUR, -30 * 24 * HOUR])
def test_a_date_that_has_jumped_is_not_until_it_has_gone_on_for_an_hour(
    bench: Bench, jump_s: float
) -> None:
    assert bench.guard.believes()
    bench.date.now += jump_s
    bench.restart()  # nor does another start make it true
    for _ in range(12):
        assert not bench.guard.believes()
        assert bench.guard.jump_s == pytest.approx(jump_s, abs=HOUR)
        bench.pass_(299)
    bench.restart()
    assert not bench.guard.believes()
    bench.pass_(HOUR + 1)
    assert bench.guard.believes()
    assert bench.guard.jump_s == 0
    bench.restart()
    assert bench.guard.believes()


def test_a_date_that_is_put_right_is_believed_at_once(bench: Bench) -> None:
    assert bench.guard.believes()
    bench.date.now += 8 * 24 * HOUR
    assert not bench.guard.believes()
    bench.pass_(60)
    bench.date.now -= 8 * 24 * HOUR
    assert bench.guard.believes()
    assert bench.guard.jump_s == 0


def test_a_second_jump_begins_the_hour_again(bench: Bench) -> None:
    assert bench.guard.believes()
    bench.date.now += 8 * 24 * HOUR
    assert not bench.guard.believes()
    bench.pass_(HOUR - 10)
    bench.date.now += 8 * 24 * HOUR
    assert not bench.guard.believes()
    bench.pass_(20)
    assert not bench.guard.believes()


def test_at_the_first_look_the_newest_task_tells_what_time_it_was(bench: Bench) -> None:
    TaskStore(bench.database, clock=bench.date).accept([NewTask("k", "m", {})], max_open=9)
    bench.date.now += 8 * 24 * HOUR
    assert not bench.guard.believes()


def test_nodes_that_look_first_together_agree(bench: Bench) -> None:
    with ThreadPoolExecutor(4) as pool:
        guards = [ClockGuard(bench.database, clock=bench.date) for _ in range(4)]
        assert all(pool.map(ClockGuard.believes, guards))
    assert jump_since_believed(bench.database, bench.date.now + 5) == 5
