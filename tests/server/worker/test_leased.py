"""The end of a task is recorded, however long the database is away."""

import time
from types import SimpleNamespace

import pytest

from redux_server.tasks.task import Status
from redux_server.worker import leased
from server.worker_bench import (
    OTHER,
    Bench,
    UnreliableStore,
)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the worker's ``time.sleep`` was asked for; it returns at once."""
    asked: list[float] = []
    names = ("time", "monotonic", "perf_counter")
    quick = SimpleNamespace(sleep=asked.append, **{name: getattr(time, name) for name in names})
    monkeypatch.setattr(leased, "time", quick)
    return asked


@pytest.mark.parametrize("failures", [1, 3])
def test_end_is_recorded_again_while_the_database_is_away(
    bench: Bench, pauses: list[float], failures: int
) -> None:
    store = UnreliableStore(bench.store, "finish", failures)
    assert bench.done(store=store).status is Status.COMPLETED
    assert pauses == [0.2, 1.0, 5.0][:failures]


def test_end_that_cannot_be_recorded_leaves_the_task_to_be_done_again(
    bench: Bench, pauses: list[float]
) -> None:
    task = bench.done(store=UnreliableStore(bench.store, "finish", 4))
    assert task.status is Status.PROCESSING
    bench.clock.now += 31
    (again,) = bench.store.claim(OTHER)
    assert (again.id, again.attempt) == (task.id, 2)
