"""Fairness by seconds: what tasks cost, who comes back after a pause, what others hold."""

from collections import Counter
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, insert, select, update

from redux_server.database.tables import tasks, usage
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Created, NewTask, Outcome, Status, Task
from server.in_process import Clock

DONE = Outcome(status=Status.COMPLETED)


@pytest.fixture
def engine(either_database: Engine) -> Engine:
    return either_database


@pytest.fixture
def store(engine: Engine, clock: Clock) -> TaskStore:
    return TaskStore(engine, lease_s=1e6, clock=clock)


def add(store: TaskStore, clock: Clock, key: str, count: int = 1) -> None:
    clock.now += 1
    accepted = store.accept([NewTask(key, "m", {}) for _ in range(count)], max_open=10_000)
    assert all(isinstance(each, Created) for each in accepted)


def work(store: TaskStore, clock: Clock, costs: dict[str, float], count: int) -> list[str]:
    """Work off ``count`` tasks one by one, each at its key's cost; whose they were."""
    served = []
    for _ in range(count):
        clock.now += 1
        (task,) = store.claim("w")
        assert store.finish(task.id, task.attempt, DONE, cost_s=costs[task.key_id])
        served.append(task.key_id)
    return served


def had(engine: Engine) -> dict[str, float]:
    with engine.connect() as db:
        return {row.key_id: row.seconds for row in db.execute(select(usage))}


def test_keys_get_equal_seconds_not_equally_many_tasks(store: TaskStore, clock: Clock) -> None:
    add(store, clock, "slow", 20)
    add(store, clock, "quick", 100)
    served = Counter(work(store, clock, {"slow": 10.0, "quick": 1.0}, 55))
    assert served["slow"] == pytest.approx(5, abs=1)


def test_order_by_seconds_holds_while_one_task_is_claimed_ahead(
    store: TaskStore, clock: Clock
) -> None:
    """What a claimed task will cost counts before anyone knows it."""
    add(store, clock, "slow", 20)
    add(store, clock, "quick", 200)
    costs = {"slow": 10.0, "quick": 1.0}
    running: list[Task] = []
    served: Counter[str] = Counter()
    for _ in range(110):
        clock.now += 1
        running += store.claim("w")
        served[running[-1].key_id] += 1
        if len(running) == 3:
            task = running.pop(0)
            store.finish(task.id, task.attempt, DONE, cost_s=costs[task.key_id])
    assert served["slow"] == pytest.approx(10, abs=3)


def test_what_tasks_did_cost_replaces_what_was_charged(
    engine: Engine, store: TaskStore, clock: Clock
) -> None:
    add(store, clock, "a", 4)
    work(store, clock, {"a": 7.5}, 3)
    assert had(engine) == {"a": pytest.approx(22.5)}
    store.claim("w")
    with engine.connect() as db:
        typical = db.scalar(select(usage.c.typical_s))
        charged = db.scalars(select(tasks.c.charged_s).where(tasks.c.lease_until >= 0)).one()
    assert typical == charged == pytest.approx(7.5 - 6.5 * 0.7**3)
    assert had(engine) == {"a": pytest.approx(22.5 + typical)}


def test_pause_earns_no_credit_and_costs_none(store: TaskStore, clock: Clock) -> None:
    add(store, clock, "early", 1)
    work(store, clock, {"early": 1.0}, 1)
    add(store, clock, "busy", 100)
    work(store, clock, {"busy": 1.0}, 50)
    add(store, clock, "early", 20)  # had 50 s less, and is to have every second task from now on
    served = Counter(work(store, clock, {"busy": 1.0, "early": 1.0}, 20))
    assert served == {"busy": 10, "early": 10}


def test_who_worked_alone_has_nothing_to_pay_back(store: TaskStore, clock: Clock) -> None:
    add(store, clock, "alone", 50)
    work(store, clock, {"alone": 1.0}, 50)
    add(store, clock, "new", 20)
    add(store, clock, "alone", 20)
    served = Counter(work(store, clock, {"alone": 1.0, "new": 1.0}, 20))
    assert served == {"alone": 10, "new": 10}


def test_tasks_from_before_there_was_a_count_are_served(
    engine: Engine, store: TaskStore, clock: Clock
) -> None:
    add(store, clock, "a", 2)
    with engine.begin() as db:
        db.execute(usage.delete())
    served = work(store, clock, {"a": 5.0}, 2)
    assert served == ["a", "a"]
    assert had(engine) == {}


@pytest.fixture
def frozen(engine: Engine) -> Iterator[None]:
    """Another process holds the row of the key "a", and does not go on."""
    with engine.begin() as db:
        db.execute(insert(usage), {"key_id": "a"})
    with engine.begin() as db:
        db.execute(update(usage).where(usage.c.key_id == "a").values(seconds=1.0))
        yield


@pytest.mark.cluster
@pytest.mark.parametrize("either_database", ["postgresql"], indirect=True)
@pytest.mark.usefixtures("frozen")
def test_row_that_a_frozen_process_holds_stops_nobody(store: TaskStore, clock: Clock) -> None:
    add(store, clock, "a", 2)
    assert work(store, clock, {"a": 1.0}, 2) == ["a", "a"]
