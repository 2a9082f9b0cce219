"""When a worker looks for work: told to by a ticket, and beside other workers."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from e2e.live import wait_until
from redux_server.storage.blobs import Blobs
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask
from redux_server.worker.batch import BatchRunner
from redux_server.worker.loop import Worker
from server.worker_bench import INPUT, GatedPipeline, Images, Safety

NEVER_S = 3600.0


class Bench:
    """A store, and workers that look only when they are told to."""

    def __init__(self, database: Engine, folder: Path) -> None:
        self.store = TaskStore(database)
        self.blobs = Blobs(folder)

    @contextmanager
    def running(self, **options: Any) -> Iterator[tuple[Worker, GatedPipeline]]:
        pipeline = GatedPipeline()
        given = {"poll_s": NEVER_S, "defer_s": NEVER_S, **options}
        maker = BatchRunner(images=Images(), pipeline=pipeline, safety=Safety(), blobs=self.blobs)
        worker = Worker("me", store=self.store, maker=maker, **given)
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            wait_until(lambda: worker.look(5.0), 10)
            yield worker, pipeline
        finally:
            pipeline.open()
            worker.stop()
            thread.join(10)
            assert not thread.is_alive()

    def accept(self, count: int = 1) -> None:
        self.store.accept([NewTask("k", "m", dict(INPUT)) for _ in range(count)], max_open=99)

    def counts(self) -> tuple[int, int]:
        state = self.store.queue_state()
        return state.waiting, state.running


@pytest.fixture
def bench(database: Engine, tmp_path: Path) -> Bench:
    return Bench(database, tmp_path / "blobs")


def test_a_look_finds_what_waits_and_returns_then(bench: Bench) -> None:
    with bench.running() as (worker, pipeline):
        assert worker.look(5.0)  # nothing there, and that is an answer too
        bench.accept()
        assert bench.counts() == (1, 0)
        assert worker.look(5.0)
        assert pipeline.is_running.wait(10)
        assert bench.counts() == (0, 1)


def test_a_worker_that_is_stopped_while_busy_claims_nothing_more_and_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its lanes waits for the device then, and is not to look once more."""
    stopped: list[bool] = []
    with bench.running() as (worker, pipeline):
        claim = bench.store.claim

        def noting(owner: str, **options: Any) -> Any:
            stopped.append(worker.is_stopping)
            return claim(owner, **options)

        monkeypatch.setattr(bench.store, "claim", noting)
        bench.accept(3)
        assert worker.look(5.0)
        assert pipeline.is_running.wait(10)
        assert bench.counts() == (2, 1)
        worker.stop()
        pipeline.open()
        wait_until(lambda: bench.counts()[1] == 0, 10)
    assert bench.counts() == (2, 0)
    assert stopped
    assert not any(stopped)


def test_a_worker_with_a_busy_device_does_not_look_and_says_so_at_once(bench: Bench) -> None:
    with bench.running() as (worker, pipeline):
        bench.accept()
        worker.wake()
        assert pipeline.is_running.wait(10)
        bench.accept()
        began = time.monotonic()
        assert not worker.look(60.0)
        assert time.monotonic() - began < 5
        assert bench.counts() == (1, 1)


def test_what_a_busy_worker_left_to_others_it_takes_when_its_device_is_free(bench: Bench) -> None:
    with bench.running() as (worker, pipeline):
        bench.accept(2)
        worker.wake()
        assert pipeline.is_running.wait(10)
        time.sleep(0.3)
        assert bench.counts() == (1, 1)
        pipeline.open()
        wait_until(lambda: bench.counts() == (0, 0), 20)  # nobody told it


def test_it_does_not_wait_for_others_for_ever(bench: Bench) -> None:
    with bench.running(defer_s=0.1) as (worker, pipeline):
        bench.accept(2)
        worker.wake()
        assert pipeline.is_running.wait(10)
        wait_until(lambda: bench.counts() == (0, 2), 20)


def test_a_stopped_worker_looks_no_more(bench: Bench) -> None:
    with bench.running() as (worker, _):
        worker.stop()
        bench.accept()
        assert worker.is_stopping
        assert not worker.look(0.2)
        assert bench.counts() == (1, 0)


@pytest.mark.parametrize("act", [Worker.wake, Worker.stop])
def test_nothing_of_this_needs_a_running_worker(bench: Bench, act: Callable[..., None]) -> None:
    maker = BatchRunner(
        images=Images(), pipeline=GatedPipeline(), safety=Safety(), blobs=bench.blobs
    )
    worker = Worker("me", store=bench.store, maker=maker)
    act(worker)
    assert not worker.look(0.1)
