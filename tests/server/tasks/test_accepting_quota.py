"""Open tasks per key: counted with everything that is open, whatever comes at once."""

import random
from collections import Counter

import pytest
from sqlalchemy import Engine

from redux_server.database.tables import tasks
from redux_server.tasks.accepting import Bounds, free_places
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Created, FreePlaces, KeyFull, NewTask, NoRoom, Outcome, Status
from server.in_process import Clock


@pytest.fixture
def store(database: Engine, clock: Clock) -> TaskStore:
    return TaskStore(database, clock=clock)


def new(key: str) -> NewTask:
    return NewTask(key_id=key, model="m", input={})


def test_one_batch_is_cut_where_its_key_is_full(store: TaskStore) -> None:
    batch = [new(key) for key in "abaabba"]
    answers = store.accept(batch, max_open=100, max_open_per_key=2)
    assert [isinstance(answer, KeyFull) for answer in answers] == [
        False, False, False, True, False, True, True,
    ]  # fmt: skip
    assert [answer.task.id for answer in answers if isinstance(answer, Created)] == [
        task.id for task, answer in zip(batch, answers, strict=True) if isinstance(answer, Created)
    ]


def test_running_tasks_count_and_ended_ones_do_not(store: TaskStore) -> None:
    store.accept([new("a"), new("a")], max_open=100, max_open_per_key=2)
    [task] = store.claim("w")
    assert store.accept([new("a")], max_open=100, max_open_per_key=2) == [KeyFull()]
    assert store.finish(task.id, task.attempt, Outcome(Status.COMPLETED))
    answers = store.accept([new("a"), new("a")], max_open=100, max_open_per_key=2)
    assert isinstance(answers[0], Created) and answers[1] == KeyFull()


def test_refused_task_takes_no_room_from_others(store: TaskStore) -> None:
    answers = store.accept([new("a"), new("a"), new("b"), new("c")], max_open=2, max_open_per_key=1)
    assert isinstance(answers[0], Created) and answers[1] == KeyFull()
    assert isinstance(answers[2], Created) and answers[3] == NoRoom()


def test_no_limit_is_no_limit(store: TaskStore) -> None:
    answers = store.accept([new("a") for _ in range(50)], max_open=50)
    assert all(isinstance(answer, Created) for answer in answers)


@pytest.mark.parametrize("seed", range(5))
def test_no_key_is_ever_over_its_limit_and_none_is_refused_below(
    store: TaskStore, database: Engine, seed: int
) -> None:
    rng = random.Random(seed)
    opened: Counter[str] = Counter()
    for _ in range(60):
        for task in store.claim("w") if rng.random() < 0.4 else ():
            assert store.finish(task.id, task.attempt, Outcome.failure(1, "x"))
            opened[task.key_id] -= 1
        left = free_places(database, list("cab"), bounds=Bounds(70, 3))
        assert left == [FreePlaces(70 - opened.total(), 3 - opened[key]) for key in "cab"]
        batch = [new(rng.choice("abc")) for _ in range(rng.randrange(5))]
        for given, answer in zip(
            batch, store.accept(batch, max_open=1000, max_open_per_key=3), strict=True
        ):
            assert isinstance(answer, Created) == (opened[given.key_id] < 3)
            opened[given.key_id] += isinstance(answer, Created)


def test_counting_reads_an_index_not_the_table(database: Engine) -> None:
    with database.connect() as db:
        plan = db.exec_driver_sql(
            "EXPLAIN QUERY PLAN SELECT key_id, count(*) FROM tasks "
            "WHERE finished_at IS NULL AND key_id IN ('a') GROUP BY key_id"
        ).all()
    assert any("INDEX tasks_open" in row[3] for row in plan), plan
    assert any("finished_at" in index.columns for index in tasks.indexes)
