"""Previews in the database: one of each task that is worked on, and none that stays."""

import pytest
from sqlalchemy import Engine, func, select

from redux_server.database.tables import previews as table
from redux_server.tasks.previews import MAX_BYTES, Previews, StoredPreview
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Created, NewTask, Outcome, Status

FIRST, SECOND = StoredPreview(1, 3, 0, b"\xff\xd8first"), StoredPreview(1, 4, 1, b"\xff\xd8second")


@pytest.fixture
def store(either_database: Engine) -> TaskStore:
    return TaskStore(either_database)


@pytest.fixture
def previews(either_database: Engine) -> Previews:
    return Previews(either_database)


def new_task(store: TaskStore) -> str:
    (created,) = store.accept([NewTask("me", "m", {})], max_open=10)
    assert isinstance(created, Created)
    return created.task.id


def count(engine: Engine) -> int:
    with engine.connect() as db:
        return int(db.scalar(select(func.count()).select_from(table)) or 0)


def test_the_last_preview_takes_the_place_of_the_one_before(
    store: TaskStore, previews: Previews, either_database: Engine
) -> None:
    task_id = new_task(store)
    assert previews.get(task_id) is None
    for each in (FIRST, SECOND):
        previews.put(task_id, each)
        assert previews.get(task_id) == each
    assert count(either_database) == 1
    assert store.glance([task_id])[task_id].previewed_step == 4


def test_who_wants_previews_is_known_before_there_are_any(
    store: TaskStore, previews: Previews
) -> None:
    task_id, other = new_task(store), new_task(store)
    previews.want(task_id)
    previews.want(task_id)
    assert previews.wanted([task_id, other]) == {task_id}
    assert previews.get(task_id) is None
    previews.put(task_id, FIRST)
    assert previews.get(task_id) == FIRST
    previews.want(task_id)
    assert previews.get(task_id) == FIRST, "another follower takes nothing away"


def test_nothing_is_kept_of_a_task_that_is_over_or_gone(
    store: TaskStore, previews: Previews, either_database: Engine
) -> None:
    ended, deleted, running = new_task(store), new_task(store), new_task(store)
    for task_id in (ended, deleted, running):
        previews.put(task_id, FIRST)
    store.delete([deleted])
    assert previews.get(deleted) is None, "what is deleted leaves no picture behind"
    for task in store.claim("w", 1):
        store.finish(task.id, task.attempt, Outcome(Status.COMPLETED))
    assert previews.sweep() == 1
    assert count(either_database) == 1
    late = next(each for each in (ended, running) if previews.get(each) is None)
    previews.want(late)
    previews.put(late, SECOND)
    previews.put("0" * 32, SECOND)
    assert count(either_database) == 1
    previews.forget({ended, running})
    assert count(either_database) == 0


def test_a_preview_that_is_too_large_is_not_stored(store: TaskStore, previews: Previews) -> None:
    task_id = new_task(store)
    previews.put(task_id, StoredPreview(1, 1, 0, bytes(MAX_BYTES + 1)))
    assert previews.get(task_id) is None
