"""Previews on their way from a worker to whoever follows a task: the last of each, and no more.

They go through the database because every worker, on whatever machine, has that and often nothing
else in common with the API. There is one row for each task that is worked on and whose previews are
wanted; it goes when the task ends. Nothing depends on it: what is lost is not made again.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sqlalchemy import Engine, delete, exists, insert, select, update

from redux_server.database.connection import reader
from redux_server.database.tables import previews, tasks

MAX_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class StoredPreview:
    """A JPEG of image ``index`` after ``step`` steps of ``attempt``."""

    attempt: int
    step: int
    index: int
    jpeg: bytes


class Previews:
    """The previews in a SQL database. Every method is one transaction, from any thread."""

    def __init__(self, database: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._reader = reader(database)
        self._clock = clock

    def want(self, task_id: str) -> None:
        """Have whoever works on the task make previews of it from now on."""
        with self._database.begin() as db:
            is_open = exists().where(tasks.c.id == task_id, tasks.c.finished_at.is_(None))
            is_new = ~exists().where(previews.c.task_id == task_id)
            if db.scalar(select(is_open & is_new)):
                db.execute(insert(previews), {"task_id": task_id, "made_at": self._clock()})

    def wanted(self, ids: Collection[str]) -> set[str]:
        """Those of the tasks whose previews somebody wants, or has."""
        query = select(previews.c.task_id).where(previews.c.task_id.in_(ids))
        with self._reader.connect() as db:
            return set(db.scalars(query))

    def put(self, task_id: str, preview: StoredPreview) -> None:
        """Store it in the place of the one before, unless the task is gone or over."""
        if len(preview.jpeg) > MAX_BYTES:
            return
        values = {
            "attempt": preview.attempt,
            "step": preview.step,
            "image": preview.index,
            "jpeg": preview.jpeg,
            "made_at": self._clock(),
        }
        with self._database.begin() as db:
            row = previews.c.task_id == task_id
            if db.execute(update(previews).where(row).values(values)).rowcount:
                return
            is_open = exists().where(tasks.c.id == task_id, tasks.c.finished_at.is_(None))
            if db.scalar(select(is_open)):
                db.execute(insert(previews), {"task_id": task_id, **values})

    def get(self, task_id: str) -> StoredPreview | None:
        """The last one; None where there is none (yet, or any more)."""
        columns = previews.c.attempt, previews.c.step, previews.c.image, previews.c.jpeg
        with self._reader.connect() as db:
            row = db.execute(select(*columns).where(previews.c.task_id == task_id)).one_or_none()
        if row is None or row.jpeg is None:
            return None
        return StoredPreview(row.attempt, row.step, row.image, bytes(row.jpeg))

    def forget(self, ids: Collection[str]) -> None:
        """Delete those of tasks that are over."""
        with self._database.begin() as db:
            db.execute(delete(previews).where(previews.c.task_id.in_(ids)))

    def sweep(self) -> int:
        """Delete those that a worker which was killed left behind; returns how many."""
        is_open = exists().where(tasks.c.id == previews.c.task_id, tasks.c.finished_at.is_(None))
        with self._database.begin() as db:
            return int(db.execute(delete(previews).where(~is_open)).rowcount)
