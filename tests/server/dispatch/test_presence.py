"""The list of workers, with a clock that the test turns."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError

from redux_server.database.migration import open_database
from redux_server.dispatch.presence import Presence, WorkerState, WorkerStatus


class Clock:
    """Unix seconds that pass only when told to."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path / 'tasks.db'}")
    yield engine
    engine.dispose()


@pytest.fixture
def presence(engine: Engine, clock: Callable[[], float]) -> Presence:
    return Presence(engine, silent_s=30.0, clock=clock)


def states(presence: Presence) -> dict[str, WorkerState]:
    return {worker.id: worker.state for worker in presence.all()}


def test_nobody_is_present_at_first(presence: Presence) -> None:
    assert presence.all() == []


def test_workers_are_listed_by_name_with_their_latest_word(presence: Presence) -> None:
    presence.announce("b", "cuda:1", WorkerState.LOADING)
    presence.announce("a", "cuda:0", WorkerState.FAILED, "no weights")
    presence.announce("b", "cuda:1", WorkerState.READY, "mini")
    assert presence.all() == [
        WorkerStatus("a", "cuda:0", WorkerState.FAILED, "no weights"),
        WorkerStatus("b", "cuda:1", WorkerState.READY, "mini"),
    ]


def test_a_silent_worker_is_gone_and_one_that_beats_is_not(
    presence: Presence, clock: Clock
) -> None:
    presence.announce("silent", "cpu", WorkerState.READY)
    presence.announce("beating", "cpu", WorkerState.READY)
    clock.now += 20
    presence.heartbeat("beating")
    clock.now += 10
    assert set(states(presence).values()) == {WorkerState.READY}
    clock.now += 0.5
    assert states(presence) == {"silent": WorkerState.GONE, "beating": WorkerState.READY}
    presence.heartbeat("silent")
    assert states(presence)["silent"] is WorkerState.READY


def test_a_worker_that_left_is_not_listed_and_its_beat_does_not_bring_it_back(
    presence: Presence,
) -> None:
    presence.announce("a", "cpu", WorkerState.READY)
    presence.leave("a")
    presence.leave("a")
    presence.heartbeat("a")
    assert presence.all() == []


def test_kept_alive_worker_stays_ready_while_its_caller_is_busy(
    presence: Presence, clock: Clock
) -> None:
    presence.announce("a", "cpu", WorkerState.LOADING)
    with presence.kept_alive("a", every_s=0.02):
        for _ in range(3):
            clock.now += 20
            time.sleep(0.2)
        assert states(presence) == {"a": WorkerState.LOADING}
    clock.now += 31
    time.sleep(0.2)
    assert states(presence) == {"a": WorkerState.GONE}


def test_heartbeat_goes_on_after_the_database_was_away(
    presence: Presence, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    presence.announce("a", "cpu", WorkerState.READY)
    beats: list[str] = []
    heartbeat = presence.heartbeat

    def unreliable(worker: str) -> None:
        beats.append(worker)
        if len(beats) == 1:
            raise OperationalError("UPDATE", {}, Exception("database is locked"))
        heartbeat(worker)

    monkeypatch.setattr(presence, "heartbeat", unreliable)
    clock.now += 31
    with presence.kept_alive("a", every_s=0.02):
        time.sleep(0.4)
    assert len(beats) > 1
    assert states(presence) == {"a": WorkerState.READY}


def test_listing_does_not_wait_for_a_writer(presence: Presence, engine: Engine) -> None:
    presence.announce("a", "cpu", WorkerState.READY)
    begun: list[str] = []
    with engine.begin():  # holds the write lock
        event.listen(engine, "before_cursor_execute", lambda *given: begun.append(given[2]))
        assert states(presence) == {"a": WorkerState.READY}
    assert "BEGIN IMMEDIATE" not in begun


def test_workers_that_were_silent_for_long_are_forgotten(presence: Presence, clock: Clock) -> None:
    presence.announce("gone", "cpu", WorkerState.READY)
    presence.announce("silent", "cpu", WorkerState.READY)
    clock.now += 100
    presence.heartbeat("silent")
    clock.now += 3550
    assert presence.forget_gone(3600) == 1
    assert states(presence) == {"silent": WorkerState.GONE}


def test_a_worker_that_was_forgotten_says_again_what_it_said(
    presence: Presence, clock: Clock
) -> None:
    """Its machine slept for an hour, or another process took its row for one that is gone."""
    presence.announce("a", "cpu", WorkerState.LOADING)
    presence.announce("a", "cpu", WorkerState.READY, "mini")
    clock.now += 3700
    assert presence.forget_gone(3600) == 1
    presence.heartbeat("a")
    assert presence.all() == [WorkerStatus("a", "cpu", WorkerState.READY, "mini")]
