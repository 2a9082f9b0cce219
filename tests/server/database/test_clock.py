"""Time for leases comes from the database where machines share one."""

import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import OperationalError

from redux_server.database.clock import DatabaseClock, clock_of
from redux_server.database.migration import open_database


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Engine]:
    engine = open_database(postgres_url)
    yield engine
    engine.dispose()


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
    clock = DatabaseClock(postgres, steady=steady)
    first = clock()
    steady.now += 59
    assert clock() == first + 59
    assert len(asked) == 1
    steady.now += 2
    assert abs(clock() - first) < 30  # the database says that no minute has passed
    assert len(asked) == 2


@pytest.mark.cluster
def test_a_database_that_is_away_is_said_and_asked_again(
    postgres: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady = Steady()
    clock = DatabaseClock(postgres, steady=steady)
    steady.now += 61

    def away(_self: DatabaseClock) -> tuple[float, float]:
        raise OperationalError("SELECT", {}, Exception("away"))

    with monkeypatch.context() as patch:
        patch.setattr(DatabaseClock, "_measure", away)
        with pytest.raises(OperationalError):
            clock()
    assert abs(clock() - time.time()) < 3600
