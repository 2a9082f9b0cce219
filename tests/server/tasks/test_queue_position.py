"""The position in the queue, held against the order in which tasks are really claimed."""

import asyncio
import random
from collections.abc import Iterable

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from redux_server.api.auth import KeyRing
from redux_server.tasks.queue_position import FURTHEST, QueuePositions
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Outcome, Status, Task
from server.in_process import SUBMIT, URL, Api, Clock

DONE = Outcome(status=Status.COMPLETED)


@pytest.fixture
def store(either_database: Engine, clock: Clock) -> TaskStore:
    return TaskStore(either_database, lease_s=1e6, clock=clock)


def add(store: TaskStore, clock: Clock, key_id: str, count: int = 1) -> list[str]:
    clock.now += 1
    new = [NewTask(key_id, "m", {}) for _ in range(count)]
    store.accept(new, max_open=10**6)
    return [task.id for task in new]


def positions(engine: Engine, tasks: Iterable[Task | None]) -> list[int | None]:
    async def ask() -> list[int | None]:
        queue = QueuePositions(engine)
        return [await queue.of(task) for task in tasks if task is not None]

    return asyncio.run(ask())


def claim_all(store: TaskStore, clock: Clock) -> list[str]:
    order = []
    while True:
        clock.now += 1
        claimed = store.claim("w")
        if not claimed:
            return order
        order += [task.id for task in claimed]


@pytest.mark.parametrize("seed", range(8))
def test_position_is_how_many_are_claimed_before(
    either_database: Engine, store: TaskStore, clock: Clock, seed: int
) -> None:
    chance = random.Random(seed)
    ring = KeyRing(either_database)
    for name in "abcdef":
        ring.create(name, priority=chance.choice([0, 0, 0, 5]))
    keys = [key.id for key in ring.list()]
    waiting: list[str] = []
    for _ in range(chance.randrange(4, 12)):
        waiting += add(store, clock, chance.choice(keys), chance.randrange(1, 5))
        for task in store.claim("w") if chance.random() < 0.6 else ():
            waiting.remove(task.id)
            if chance.random() < 0.5:
                store.finish(task.id, task.attempt, DONE)
    told = positions(either_database, store.get(waiting))
    order = claim_all(store, clock)
    assert sorted(order) == sorted(waiting)
    assert dict(zip(waiting, told, strict=True)) == {name: order.index(name) for name in waiting}


def test_only_a_task_that_was_never_begun_has_a_position(
    either_database: Engine, store: TaskStore, clock: Clock
) -> None:
    (first,) = add(store, clock, "a")
    (second,) = add(store, clock, "a")
    (task,) = store.claim("w")
    assert positions(either_database, store.get([first, second])) == [None, 0]
    store.give_back(task.id, task.attempt)
    assert positions(either_database, store.get([first, second])) == [None, 1]
    store.cancel(first, "a")
    assert positions(either_database, store.get([first, second])) == [None, 0]


def test_far_behind_it_is_a_lower_bound(
    either_database: Engine, store: TaskStore, clock: Clock
) -> None:
    ids = add(store, clock, "a", FURTHEST + 50)
    told = positions(either_database, store.get([ids[0], ids[FURTHEST - 1], ids[-1]]))
    assert told == [0, FURTHEST - 1, FURTHEST]


def test_polls_share_what_was_read_and_do_not_wait_for_more(
    either_database: Engine, store: TaskStore, clock: Clock
) -> None:
    ids = add(store, clock, "a", 3)
    reads = []

    async def ask() -> None:
        queue = QueuePositions(either_database, clock=clock)
        read = queue._read_lines
        queue._read_lines = lambda: reads.append(1) or read()  # type: ignore[method-assign,func-returns-value]
        tasks = [task for task in store.get(ids) if task]
        told = await asyncio.gather(*(queue.of(task) for task in tasks * 20))
        assert told == [0, 1, 2] * 20
        store.claim("w")
        assert len(reads) == 1 and await queue.of(tasks[2]) == 2
        clock.now += 1
        assert await queue.of(tasks[2]) == 2, "the old summary, while the new one is read"
        while queue._reading:
            await asyncio.sleep(0.01)
        assert await queue.of(tasks[2]) == 1
        clock.now += 60
        store.claim("w")
        assert await queue.of(tasks[2]) == 0, "too old to be told"
        assert len(reads) == 3

    asyncio.run(ask())


def test_poll_tells_the_position_while_the_task_waits(api: Api) -> None:
    first, second = (api.post(SUBMIT, json=URL).json()["data"]["id"] for _ in range(2))

    def progress(task_id: str) -> dict[str, int]:
        answer = api.get(f"/api/v3/predictions/{task_id}/result").json()
        found: dict[str, int] = answer["data"]["progress"]
        return found

    assert progress(first)["queue_position"] == 0
    assert progress(second)["queue_position"] == 1
    api.services.store.claim("w")
    assert "queue_position" not in progress(first)


def test_poll_is_answered_without_a_position_where_the_queue_cannot_be_read(api: Api) -> None:
    def fail() -> None:
        raise OperationalError("", {}, Exception("away"))

    api.services.queue._read_lines = fail  # type: ignore[method-assign,assignment]
    task = api.post(SUBMIT, json=URL).json()["data"]
    answer = api.get(task["urls"]["get"])
    assert answer.status_code == 200
    assert "queue_position" not in answer.json()["data"]["progress"]
