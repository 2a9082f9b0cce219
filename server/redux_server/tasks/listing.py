"""A key's tasks, page by page, and how many there were by day.

Pages are found in one index, which holds the status too: of the tasks before a page, and of those
with another status, no row is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Engine, Select, func, select

from redux_server.database.connection import reader
from redux_server.database.tables import tasks
from redux_server.tasks.rows import COLUMNS, task_of
from redux_server.tasks.task import Status, Task

DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which of a key's tasks: those that meet all that is given. Times are Unix seconds.

    ``after`` is a time that belongs to what is wanted, ``before`` one that does not.
    """

    key_id: str
    model: str | None = None
    status: Status | None = None
    after: float | None = None
    before: float | None = None
    ids: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class DayCount:
    """How many tasks were accepted on the day that begins at ``day`` (Unix seconds)."""

    day: int
    model: str
    status: Status
    count: int


class History:
    """Reads tasks, newest first. Every method may be called from any thread."""

    def __init__(self, database: Engine) -> None:
        self._reader = reader(database)

    def page(
        self, wanted: Wanted, *, number: int, size: int, oldest_first: bool = False
    ) -> list[Task]:
        """The page ``number`` (from 1) of ``size`` tasks; the last one may have fewer."""
        found = page_ids(wanted, number=number, size=size, oldest_first=oldest_first).subquery()
        query = select(*COLUMNS).where(tasks.c.id.in_(select(found.c.id)))
        with self._reader.connect() as db:
            return [task_of(row) for row in db.execute(_ordered(query, oldest_first))]

    def count(self, wanted: Wanted) -> int:
        """How many tasks there are."""
        query = select(func.count()).select_from(tasks).where(*_conditions(wanted))
        with self._reader.connect() as db:
            return int(db.scalar(query) or 0)

    def count_by_day(self, wanted: Wanted, *, first: int, end: int) -> list[DayCount]:
        """Counts by day (of UTC), model and status, from ``first`` to before ``end``.

        Both are Unix seconds; days that they cut are counted as far as they are wanted.
        """
        counts = []
        with self._reader.connect() as db:
            for day in range(first - first % DAY_S, end, DAY_S):
                begin, stop = max(first, day), min(end, day + DAY_S)
                rows = db.execute(_counts(replace(wanted, after=begin, before=stop)))
                counts += [DayCount(day, m, Status(s), n) for m, s, n in sorted(map(tuple, rows))]
        return counts


def last_submits(database: Engine, key_ids: Sequence[str]) -> dict[str, float]:
    """When the newest task that is kept of each of these keys came, of those that have any."""
    newest = func.max(tasks.c.created_at)
    found = {}
    with reader(database).connect() as db:
        for key_id in key_ids:  # one look into the index each; grouped, all tasks would be read
            at = db.scalar(select(newest).where(tasks.c.key_id == key_id))
            if at is not None:
                found[key_id] = float(at)
    return found


def page_ids(
    wanted: Wanted, *, number: int, size: int, oldest_first: bool = False
) -> Select[tuple[str]]:
    """The statement that finds a page's ids."""
    query = _ordered(select(tasks.c.id).where(*_conditions(wanted)), oldest_first)
    return query.limit(size).offset((number - 1) * size)


def _counts(wanted: Wanted) -> Select[Any]:
    kinds = tasks.c.model, tasks.c.status
    return select(*kinds, func.count()).where(*_conditions(wanted)).group_by(*kinds)


def _conditions(wanted: Wanted) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [tasks.c.key_id == wanted.key_id]
    if wanted.model is not None:
        conditions.append(tasks.c.model == wanted.model)
    if wanted.status is not None:
        conditions.append(tasks.c.status == wanted.status)
    if wanted.after is not None:
        conditions.append(tasks.c.created_at >= wanted.after)
    if wanted.before is not None:
        conditions.append(tasks.c.created_at < wanted.before)
    if wanted.ids is not None:
        conditions.append(tasks.c.id.in_(wanted.ids))
    return conditions


def _ordered(query: Select[Any], oldest_first: bool) -> Select[Any]:
    columns = (tasks.c.created_at, tasks.c.id)  # two tasks may have one time
    return query.order_by(*(each if oldest_first else each.desc() for each in columns))
