"""What the API makes of the list of workers."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from redux_server.api.fleet import Fleet, FleetWatch
from redux_server.dispatch.presence import WorkerState, WorkerStatus
from redux_server.tasks.rows import new_row, task_from
from redux_server.tasks.task import NewTask, Status, Task
from server.in_process import Clock

OLD, NEW, OTHER = "aaa/1.0.0", "aaa/1.1.0", "bbb/1.1.0"


def worker(state: WorkerState, fingerprint: str = "", detail: str = "") -> WorkerStatus:
    model = "mini" if fingerprint else ""
    return WorkerStatus("id", "cpu", state, detail, model, fingerprint)


READY, LOADING = WorkerState.READY, WorkerState.LOADING
FAILED, GONE = WorkerState.FAILED, WorkerState.GONE


def task(fingerprint: str = "") -> Task:
    return task_from(new_row(NewTask("k", "m", {}, fingerprint=fingerprint), priority=0, now=1.0))


@pytest.mark.parametrize(
    ("workers", "found"),
    [
        ([], ""),
        ([worker(READY, OLD)], OLD),
        ([worker(READY, OLD), worker(READY, NEW), worker(READY, OLD)], OLD),
        ([worker(READY, OLD), worker(READY, NEW)], NEW),
        ([worker(LOADING)], ""),
        ([worker(GONE, OLD), worker(LOADING)], OLD),
        ([worker(GONE, OLD), worker(READY, NEW)], NEW),
        ([worker(READY, "")], ""),
    ],
)
def test_a_task_is_accepted_for_what_most_workers_run(
    workers: list[WorkerStatus], found: str
) -> None:
    assert Fleet(workers).fingerprint == found


@pytest.mark.parametrize(
    ("workers", "failure"),
    [
        ([], ""),
        ([worker(FAILED, detail="no weights")], "no weights"),
        ([worker(FAILED, detail="no weights"), worker(READY, NEW)], ""),
        ([worker(FAILED, detail="no weights"), worker(LOADING)], ""),
        ([worker(FAILED, detail="a"), worker(FAILED, detail="b"), worker(GONE)], "a; b"),
        ([worker(GONE)], ""),
    ],
)
def test_it_has_failed_where_no_worker_can_load_its_model(
    workers: list[WorkerStatus], failure: str
) -> None:
    assert Fleet(workers).failure == failure


@pytest.mark.parametrize(
    ("workers", "fingerprint", "says"),
    [
        ([worker(READY, NEW)], NEW, None),
        ([worker(READY, NEW)], "", None),
        ([worker(READY, NEW)], OLD, None),
        ([worker(READY, NEW)], OTHER, "a worker with the weights bbb and version 1.1.0"),
        ([], "", "a worker; none is ready"),
        ([worker(LOADING)], NEW, "a worker; none is ready"),
        ([worker(FAILED, detail="no weights")], NEW, "can load its model: no weights"),
    ],
)
def test_a_waiting_task_says_what_it_waits_for(
    workers: list[WorkerStatus], fingerprint: str, says: str | None
) -> None:
    found = Fleet(workers).waiting_for(task(fingerprint))
    assert found is says is None or (says is not None and says in str(found))
    begun = replace(task(fingerprint), status=Status.PROCESSING)
    assert Fleet(workers).waiting_for(begun) is None


def test_what_nobody_takes_is_counted() -> None:
    fleet = Fleet([worker(READY, NEW)])
    assert fleet.unserved({"": 1, NEW: 2, OLD: 3, OTHER: 4}) == {OTHER: 4}


class Listing:
    """A list of workers that counts who asks, and may be away."""

    def __init__(self) -> None:
        self.asked = 0
        self.is_away = False

    def all(self) -> list[WorkerStatus]:
        self.asked += 1
        if self.is_away:
            raise OperationalError("SELECT", {}, Exception("away"))
        return [worker(READY, NEW)]


def test_the_list_is_read_once_a_second_and_survives_a_database_that_is_away() -> None:
    async def scenario() -> None:
        clock, listing = Clock(), Listing()
        given: Any = listing
        watch = FleetWatch(given, every_s=1.0, clock=clock)
        assert watch.last.ready == []
        found = await asyncio.gather(*(watch.now() for _ in range(20)))
        assert listing.asked == 1 and all(each.fingerprint == NEW for each in found)
        clock.now += 1.0
        listing.is_away = True
        assert (await watch.now()).fingerprint == NEW and listing.asked == 2
        assert (await watch.now()).fingerprint == NEW and listing.asked == 2

    asyncio.run(scenario())
