"""The task store: accept, claim under a lease, finish once.

All truth about a task is one row. A claim takes a lease and raises ``attempt``; whoever finishes
must still hold that attempt, so a worker that was given up for dead cannot overwrite its
successor's result. Knows no HTTP, no images and no processes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    ScalarSelect,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from redux_server.database import reader, tasks
from redux_server.tasks import Code, NewTask, Outcome, Status, Task

_COLUMNS = tuple(tasks.c[name] for name in Task.__slots__)
# Not IS NOT NULL, for which SQLite reads the whole table instead of the index.
_IS_QUEUED = tasks.c.queued_at >= 0
_IS_LEASED = tasks.c.lease_until >= 0
_GET = select(*_COLUMNS).where(tasks.c.id.in_(bindparam("ids", expanding=True)))


@dataclass(frozen=True, slots=True)
class Lease:
    """The answer to a heartbeat: which of the tasks a worker thinks it holds it has lost."""

    lost: frozenset[str]


@dataclass(frozen=True, slots=True)
class QueueState:
    """How much work there is."""

    waiting: int
    running: int
    oldest_waiting_s: float


class TaskStore:
    """Tasks in a SQL database. Every method is one transaction; all may be called from any thread.

    ``clock`` gives Unix seconds and is replaced in tests.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        lease_s: float = 30.0,
        max_attempts: int = 3,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._reader = reader(engine)
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._clock = clock

    def accept(self, new: Sequence[NewTask], *, max_open: int) -> list[Task | None]:
        """Store as many of ``new`` as fit under ``max_open`` open tasks, durably, in one commit.

        Returns the stored task, or None where the queue was full, in the order given.
        """
        with self._engine.begin() as db:
            room = max(0, max_open - _count_open(db))
            now = self._clock()
            rows = [_new_row(task, now) for task in new[:room]]
            if rows:
                db.execute(insert(tasks), rows)
        accepted: list[Task | None] = [_task_from(row) for row in rows]
        return accepted + [None] * (len(new) - len(rows))

    def get(self, ids: Sequence[str]) -> list[Task | None]:
        """The tasks with these ids, in the order given; None for an unknown one."""
        with self._reader.connect() as db:
            found = {row.id: _task(row) for row in db.execute(_GET, {"ids": list(set(ids))})}
        return [found.get(task_id) for task_id in ids]

    def claim(self, owner: str) -> Task | None:
        """Lease the longest-waiting task to ``owner``, or None when nothing waits.

        Leases that ran out go back to the queue first.
        """
        if not self._has_work():
            return None
        with self._engine.begin() as db:
            now = self._clock()
            self._take_back(db, tasks.c.lease_until < now, now)
            oldest = (
                select(tasks.c.id)
                .where(_IS_QUEUED)
                .order_by(tasks.c.queued_at)
                .limit(1)
                .with_for_update(skip_locked=True)
                .scalar_subquery()
            )
            row = db.execute(
                update(tasks)
                .where(tasks.c.id == oldest)
                .values(
                    status=Status.PROCESSING,
                    owner=owner,
                    attempt=tasks.c.attempt + 1,
                    queued_at=None,
                    lease_until=now + self._lease_s,
                    started_at=now,
                    progress_step=0,
                )
                .returning(*_COLUMNS)
            ).one_or_none()
        return None if row is None else _task(row)

    def renew(self, owner: str, held: Mapping[str, tuple[int, int]]) -> Lease:
        """Extend ``owner``'s leases and record progress.

        Args:
            owner: the worker that holds the tasks.
            held: ``(attempt, denoising steps done)`` by task id.

        Returns:
            The ids in ``held`` that ``owner`` no longer holds; it must stop working on them.
        """
        kept: set[str] = set()
        with self._engine.begin() as db:
            for task_id, (attempt, step) in held.items():
                changed = db.execute(
                    update(tasks)
                    .where(tasks.c.id == task_id, tasks.c.attempt == attempt)
                    .where(tasks.c.owner == owner, _IS_LEASED)
                    .values(
                        lease_until=self._clock() + self._lease_s,
                        progress_step=step,
                    )
                )
                if changed.rowcount:
                    kept.add(task_id)
        return Lease(lost=frozenset(held) - kept)

    def finish(self, task_id: str, attempt: int, outcome: Outcome) -> bool:
        """Record how ``attempt`` ended. False: a later attempt or an end was there first."""
        with self._engine.begin() as db:
            changed = db.execute(
                update(tasks)
                .where(tasks.c.id == task_id, tasks.c.attempt == attempt)
                .where(tasks.c.status == Status.PROCESSING)
                .values(_ended(outcome, self._clock()))
            )
        return bool(changed.rowcount)

    def release(self, owner: str, *, has_crashed: bool = True) -> int:
        """Take back every task of a worker that is known to be gone; returns how many.

        One that was told to go (``has_crashed`` false) puts none of them under suspicion.
        """
        with self._engine.begin() as db:
            held_by = tasks.c.owner == owner
            return self._take_back(db, held_by, self._clock(), has_crashed=has_crashed)

    def queue_state(self) -> QueueState:
        """Counts for metrics and for `Retry-After`."""
        oldest_queued = select(func.min(tasks.c.queued_at)).scalar_subquery()
        query = select(_count(_IS_QUEUED), _count(_IS_LEASED), oldest_queued)
        with self._reader.connect() as db:
            waiting, running, oldest = db.execute(query).one()
        age = 0.0 if oldest is None else max(0.0, self._clock() - oldest)
        return QueueState(waiting, running, age)

    def ended_before(self, when: float, *, limit: int = 100) -> list[str]:
        """Ids of at most ``limit`` tasks that ended before ``when``, oldest first."""
        query = (
            select(tasks.c.id)
            .where(tasks.c.finished_at < when)
            .order_by(tasks.c.finished_at)
            .limit(limit)
        )
        with self._reader.connect() as db:
            return list(db.scalars(query))

    def delete(self, ids: Sequence[str]) -> None:
        """Forget these tasks."""
        with self._engine.begin() as db:
            db.execute(delete(tasks).where(tasks.c.id.in_(ids)))

    def _has_work(self) -> bool:
        queued = select(tasks.c.id).where(_IS_QUEUED).limit(1)
        expired = select(tasks.c.id).where(tasks.c.lease_until < self._clock()).limit(1)
        with self._reader.connect() as db:
            return db.scalar(queued) is not None or db.scalar(expired) is not None

    def _take_back(
        self, db: Connection, condition: Any, now: float, *, has_crashed: bool = True
    ) -> int:
        held = [_IS_LEASED, condition]
        poisoned = self._give_up(db, held, now) if has_crashed else 0
        # Back to its old place in the queue, not to its end.
        returned = db.execute(
            update(tasks)
            .where(*held)
            .values(
                queued_at=tasks.c.created_at,
                lease_until=None,
                owner=None,
                crashes=tasks.c.crashes + int(has_crashed),
            )
        )
        return poisoned + int(returned.rowcount)

    def _give_up(self, db: Connection, held: list[Any], now: float) -> int:
        reason = f"The worker stopped unexpectedly {self._max_attempts} times during this task."
        poisoned = db.execute(
            update(tasks)
            .where(*held, tasks.c.crashes + 1 >= self._max_attempts)
            .values(_ended(Outcome.failure(Code.INTERNAL, reason), now))
        )
        return int(poisoned.rowcount)


def _count_open(db: Connection) -> int:
    return int(db.scalar(select(_count(_IS_QUEUED) + _count(_IS_LEASED))) or 0)


def _count(condition: ColumnElement[bool]) -> ScalarSelect[int]:
    return select(func.count()).where(condition).select_from(tasks).scalar_subquery()


def _new_row(new: NewTask, now: float) -> dict[str, Any]:
    return {
        "id": new.id,
        "key_id": new.key_id,
        "model": new.model,
        "status": Status.CREATED,
        "input": new.input,
        "request_id": new.request_id,
        "created_at": now,
        "queued_at": now,
    }


def _ended(outcome: Outcome, now: float) -> dict[str, Any]:
    return {
        "status": outcome.status,
        "outcome": asdict(outcome),
        "finished_at": now,
        "queued_at": None,
        "lease_until": None,
    }


def _task_from(row: Mapping[str, Any]) -> Task:
    given = {name: row[name] for name in Task.__slots__ if name in row}
    defaults: dict[str, Any] = {
        "started_at": None,
        "finished_at": None,
        "attempt": 0,
        "crashes": 0,
        "progress_step": 0,
        "outcome": None,
    }
    return Task(**{**defaults, **given})


def _task(row: Row[Any]) -> Task:
    values = dict(row._mapping)
    values["status"] = Status(values["status"])
    if values["outcome"] is not None:
        outcome = values["outcome"]
        values["outcome"] = Outcome(**{**outcome, "status": Status(outcome["status"])})
    return Task(**values)
