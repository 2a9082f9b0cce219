"""How many waiting tasks go before one, cheaply enough to be told at every poll.

The position is the number of tasks that workers would begin before it if from now on no task
ended, came or was cancelled, and each was begun alone: it follows from the order of
``redux_server.tasks.claiming``, the key that has had the fewest seconds first, each task costing
what is typical of its key. Tasks that end or come meanwhile move it both ways; a key's own later
tasks never do.

Polls share a summary of the queue, one line for each key that waits. It is read at most every half
second, in at most a fiftieth of the time, and polls go on with the last one while the next is read.
"""

import asyncio
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Engine, func, select

from redux_server.database.connection import DATABASE_AWAY, reader
from redux_server.database.tables import tasks, usage
from redux_server.tasks.rows import IS_QUEUED
from redux_server.tasks.task import Status, Task
from redux_server.tasks.usage import FIRST_GUESS_S

EVERY_S = 0.5
SHARE = 50  # reading takes at most one part of so many of the time
TOO_OLD_S = 15.0
_SAME = 1e-6
FURTHEST = 1000  # of a key's own tasks; those behind are told the position of this one


@dataclass(frozen=True, slots=True)
class Line:
    """The waiting tasks of one key at one priority, and what a fair claim knows of the key."""

    priority: int
    key_id: str
    waiting: int
    seconds: float  # that it has had
    typical_s: float  # of each of its tasks
    turn: tuple[float, float, str]  # among keys that have had as much

    def begun(self, level: float, other: "Line") -> int:
        """How many of its tasks are begun before ``other``, at the ``level``, has its turn."""
        steps = (level - self.seconds) / self.typical_s
        # Of two that have come to the same level, the one that was there first.
        if steps >= 0 and abs(steps - round(steps)) < _SAME:
            return round(steps) + self._goes_before(other)
        return math.ceil(steps)

    def _goes_before(self, other: "Line") -> bool:
        return (-self.seconds, self.turn) < (-other.seconds, other.turn)


def position(lines: Sequence[Line], mine: Line, rank: int) -> int:
    """How many tasks go before the one with ``rank`` (from 0) in the line ``mine``."""
    ahead = rank
    level = mine.seconds + rank * mine.typical_s  # what its key has had when its turn comes
    for other in lines:
        if other.priority > mine.priority:
            ahead += other.waiting
        elif other.priority == mine.priority and other is not mine:
            ahead += min(other.waiting, max(0, other.begun(level, mine)))
    return ahead


@dataclass(slots=True)
class _Summary:
    lines: dict[tuple[int, str], Line]
    read_at: float
    cost_s: float
    times: "dict[Line, asyncio.Task[list[float]]]" = field(default_factory=dict)
    known: dict[tuple[Line, int], int] = field(default_factory=dict)


class QueuePositions:
    """Tells positions. Must be used from one event loop; ``clock`` is replaced in tests."""

    def __init__(self, database: Engine, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._reader = reader(database)
        self._clock = clock
        self._summary: _Summary | None = None
        self._reading: asyncio.Task[_Summary] | None = None

    async def of(self, task: Task) -> int | None:
        """The position of a task that has not been begun; None for others, or where not known."""
        if task.status is not Status.CREATED:
            return None
        try:
            summary = await self._recent()
            line = summary.lines.get((task.priority, task.key_id))
            if line is None:  # it came after the summary
                return None
            rank = bisect_left(await self._times(summary, line), task.created_at)
        except DATABASE_AWAY:
            return None
        if (line, rank) not in summary.known:
            found = position(list(summary.lines.values()), line, rank)
            summary.known[line, rank] = found
        return summary.known[line, rank]

    async def _recent(self) -> _Summary:
        age_s = self._clock() - self._summary.read_at if self._summary else TOO_OLD_S
        if self._summary and age_s < max(EVERY_S, SHARE * self._summary.cost_s):
            return self._summary
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
            self._reading.add_done_callback(self._has_read)
        if self._summary and age_s < TOO_OLD_S:
            return self._summary
        return await asyncio.shield(self._reading)

    async def _read(self) -> _Summary:
        started = self._clock()
        lines = await asyncio.to_thread(self._read_lines)
        now = self._clock()
        return _Summary({(each.priority, each.key_id): each for each in lines}, now, now - started)

    def _has_read(self, reading: "asyncio.Task[_Summary]") -> None:
        self._reading = None
        if not reading.cancelled() and reading.exception() is None:
            self._summary = reading.result()

    async def _times(self, summary: _Summary, line: Line) -> list[float]:
        """When the first tasks of a line came, in order."""
        if line not in summary.times:
            summary.times[line] = asyncio.create_task(asyncio.to_thread(self._read_times, line))
        return await asyncio.shield(summary.times[line])

    def _read_lines(self) -> list[Line]:
        others = tasks.alias()
        is_theirs = others.c.key_id == tasks.c.key_id
        latest = select(func.max(others.c.started_at)).where(is_theirs)
        query = (
            select(
                tasks.c.priority,
                tasks.c.key_id,
                func.count(),
                func.coalesce(usage.c.seconds, 0.0),
                func.coalesce(usage.c.typical_s, FIRST_GUESS_S),
                func.coalesce(latest.scalar_subquery(), 0.0),
                func.min(tasks.c.queued_at),
            )
            .select_from(tasks.outerjoin(usage, usage.c.key_id == tasks.c.key_id))
            .where(IS_QUEUED)
            .group_by(tasks.c.priority, tasks.c.key_id, usage.c.seconds, usage.c.typical_s)
        )
        with self._reader.connect() as db:
            return [
                Line(priority, key_id, waiting, seconds, typical_s, (latest, oldest, key_id))
                for priority, key_id, waiting, seconds, typical_s, latest, oldest in db.execute(
                    query
                )
            ]

    def _read_times(self, line: Line) -> list[float]:
        is_theirs = tasks.c.priority == line.priority, tasks.c.key_id == line.key_id
        query = select(tasks.c.queued_at).where(IS_QUEUED, *is_theirs)
        with self._reader.connect() as db:
            return list(db.scalars(query.order_by(tasks.c.queued_at).limit(FURTHEST)))
