"""The task store: accept, claim under a lease, finish once.

All truth about a task is one row. A claim takes a lease and raises ``attempt``; whoever finishes
must still hold that attempt, so a worker that was given up for dead cannot overwrite its
successor's result. Knows no HTTP, no images and no processes.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    ScalarSelect,
    bindparam,
    delete,
    exists,
    func,
    or_,
    select,
    update,
)

from redux_server.database.connection import reader, take_turns
from redux_server.database.tables import previews, tasks, webhooks
from redux_server.tasks import accepting, claiming, stored, usage
from redux_server.tasks.accepting import unbounded
from redux_server.tasks.rows import COLUMNS, IS_DELAYED, IS_LEASED, IS_QUEUED, count, end, task_of
from redux_server.tasks.task import Acceptance, Code, NewTask, Outcome, Status, Task

LONGEST_DELAY_S = 300.0
"""For how long a task is given back at most."""
CLOCKS_DIFFER_S = 60.0
"""By how much the clocks of nodes may differ before times of one look wrong to another."""
_TINY = 1e-6
_QUEUE_STATE = select(
    count(IS_QUEUED) + count(IS_DELAYED),
    count(IS_LEASED),
    select(func.min(tasks.c.queued_at)).scalar_subquery(),
)
_GLANCE = (
    select(tasks.c.id, tasks.c.status, tasks.c.attempt, tasks.c.progress_step, previews.c.step)
    .join_from(tasks, previews, previews.c.task_id == tasks.c.id, isouter=True)
    .where(tasks.c.id.in_(bindparam("ids", expanding=True)))
)
_GET = select(*COLUMNS).where(tasks.c.id.in_(bindparam("ids", expanding=True)))


class Glance(NamedTuple):
    """What changes of a task while it is worked on."""

    status: Status
    attempt: int
    steps_done: int
    previewed_step: int | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The answer to a heartbeat: what became of the tasks a worker thinks it holds.

    It must stop working on all in either set; those in ``cancelled`` are still its to finish.
    """

    lost: frozenset[str]
    cancelled: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Cancellation:
    """A task after a cancel, and whether it was the cancel that ended it."""

    task: Task
    has_ended_it: bool


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
        database: Engine,
        *,
        lease_s: float = 30.0,
        max_attempts: int = 3,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._reader = reader(database)
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._clock = clock

    # --- the owner's side ---------------------------------------------------------------------

    def accept(
        self,
        new: Sequence[NewTask],
        *,
        max_open: int,
        max_open_per_key: int = 0,
        share: int = 100,
        left_bytes: Callable[[int], int] = unbounded,
    ) -> list[Acceptance]:
        """Store as many of ``new`` as fit under ``max_open`` open tasks, durably, in one commit.

        Returns what became of each, in the order given. A task whose idempotency key is known is
        answered from the first with it, whether or not there is room. No API key gets more than
        ``max_open_per_key`` open tasks (0: as many as fit), nor more than its share, of which
        ``share`` is the percentage for a key that is alone (see ``accepting.Bounds``). Of a key
        whose tasks count so many bytes, ``left_bytes`` says how many more they may.
        """
        with self._database.begin() as db:
            take_turns(db, "accept")
            bounds = accepting.Bounds(max_open, max_open_per_key, share, left_bytes)
            return accepting.accept(db, new, bounds=bounds, now=self._clock())

    def get(self, ids: Sequence[str]) -> list[Task | None]:
        """The tasks with these ids, in the order given; None for an unknown one."""
        with self._reader.connect() as db:
            found = {row.id: task_of(row) for row in db.execute(_GET, {"ids": list(set(ids))})}
        return [found.get(task_id) for task_id in ids]

    def glance(self, ids: Sequence[str]) -> dict[str, Glance]:
        """Of those of the tasks that there are, by id: what changes while one is worked on."""
        with self._reader.connect() as db:
            found = db.execute(_GLANCE, {"ids": list(ids)})
            return {
                row.id: Glance(Status(row.status), row.attempt, row.progress_step, row.step)
                for row in found
            }

    def cancel(self, task_id: str, key_id: str) -> Cancellation | None:
        """End a task of this key if it waits; have its worker end it if one holds it.

        One that has ended is left as it is. None if the key has no such task.
        """
        mine = tasks.c.id == task_id, tasks.c.key_id == key_id
        with self._database.begin() as db:
            now = self._clock()
            row = db.execute(select(tasks.c.lease_until).where(*mine).with_for_update()).first()
            if row is None:
                return None
            waits = or_(IS_QUEUED, IS_DELAYED)
            ended = end(db, *mine, waits, outcome=Outcome.cancellation(), now=now)
            db.execute(
                update(tasks)
                .where(*mine, IS_LEASED, tasks.c.cancel_requested_at.is_(None))
                .values(cancel_requested_at=now)
            )
            task = task_of(db.execute(select(*COLUMNS).where(*mine)).one())
        return Cancellation(task, has_ended_it=bool(ended))

    def delete(self, ids: Sequence[str], *, key_id: str | None = None) -> list[str]:
        """Forget these tasks, whatever they are doing; returns the ids that there were.

        With a ``key_id``, those of that key only. A worker that holds one loses it. What was to be
        told of a task is not told any more.
        """
        mine = [tasks.c.id.in_(ids)] + ([tasks.c.key_id == key_id] if key_id is not None else [])
        with self._database.begin() as db:
            returned = tasks.c.id, tasks.c.key_id, tasks.c.stored_bytes
            rows = db.execute(delete(tasks).where(*mine).returning(*returned)).all()
            gone, freed = [row.id for row in rows], Counter[str]()
            for row in rows:
                freed[row.key_id] -= row.stored_bytes
            stored.note(db, freed)
            for table in (webhooks, previews):
                db.execute(delete(table).where(table.c.task_id.in_(gone)))
        return gone

    # --- the worker's side --------------------------------------------------------------------

    def claim(
        self,
        owner: str,
        n: int = 1,
        *,
        like: str = "",
        without: Collection[str] = (),
        priority: int | None = None,
        accepted_for: Collection[str] = (),
    ) -> list[Task]:
        """Lease to ``owner`` the next task, and up to ``n - 1`` more of its shape and priority.

        The first is the fairest (see ``redux_server.tasks.claiming``); with ``like``, the fairest
        of that shape. None of the others has ever cost a worker, and neither has a first that has
        company. Leases that ran out, and tasks whose delay is over, go back to the queue first.

        No task of the API keys ``without`` is claimed, and none below ``priority``. With
        ``accepted_for`` only tasks with one of these fingerprints are taken.
        """
        wanted = claiming.Wanted(like, frozenset(without), priority, tuple(accepted_for))
        if not self._has_work(wanted):
            return []
        with self._database.begin() as db:
            now = self._clock()
            self._back_to_the_queue(db, now)
            lease = claiming.lease_values(owner, now, self._lease_s)
            return claiming.claim(db, wanted, count=n, lease=lease)

    def renew(self, owner: str, leased: Mapping[str, tuple[int, int]]) -> Lease:
        """Extend ``owner``'s leases and record progress.

        Args:
            owner: the worker that holds the tasks.
            leased: ``(attempt, denoising steps done)`` by task id.

        Returns:
            Which of those in ``leased`` it no longer holds, and which of the others are cancelled.
        """
        wanted: dict[str, bool] = {}
        with self._database.begin() as db:
            for task_id, (attempt, step) in leased.items():
                row = db.execute(
                    update(tasks)
                    .where(tasks.c.id == task_id, tasks.c.attempt == attempt)
                    .where(tasks.c.owner == owner, IS_LEASED)
                    .values(lease_until=self._clock() + self._lease_s, progress_step=step)
                    .returning(tasks.c.cancel_requested_at)
                ).one_or_none()
                if row is not None:
                    wanted[task_id] = row.cancel_requested_at is None
        cancelled = frozenset(task_id for task_id, is_wanted in wanted.items() if not is_wanted)
        return Lease(lost=frozenset(leased) - wanted.keys(), cancelled=cancelled)

    def finish(
        self,
        task_id: str,
        attempt: int,
        outcome: Outcome,
        *,
        cost_s: float | None = None,
        kept_bytes: int | None = None,
    ) -> bool:
        """Record how ``attempt`` ended. False: a later attempt or an end was there first.

        ``cost_s`` are the seconds of device and fetching that it took, ``kept_bytes`` what the
        images that are there count; None if nobody knows.
        """
        is_current = tasks.c.id == task_id, tasks.c.attempt == attempt
        is_running = tasks.c.status == Status.PROCESSING
        with self._database.begin() as db:
            ended = end(
                db,
                *is_current,
                is_running,
                outcome=outcome,
                now=self._clock(),
                kept_bytes=kept_bytes,
            )
            if ended and cost_s is not None:
                usage.settle(db, ended[0].key_id, charged_s=ended[0].charged_s, cost_s=cost_s)
        return bool(ended)

    def give_back(
        self,
        task_id: str,
        attempt: int,
        *,
        delay_s: float = 0.0,
        error: str = "",
        has_crashed: bool = False,
    ) -> bool:
        """Return one task to its place in the queue, to be claimed in ``delay_s`` seconds.

        With ``has_crashed`` that was one of its ``max_attempts``; after the last it has failed, for
        the reason ``error``. False: it was no longer held under ``attempt``.
        """
        is_it = (tasks.c.id == task_id) & (tasks.c.attempt == attempt)
        with self._database.begin() as db:
            now = self._clock()
            taken = self._take_back(
                db, is_it, now, has_crashed=has_crashed, delay_s=delay_s, error=error
            )
        return bool(taken)

    def release(self, owner: str, *, has_crashed: bool = True) -> int:
        """Take back every task of a worker that is known to be gone; returns how many.

        One that was told to go (``has_crashed`` false) puts none of them under suspicion.
        """
        with self._database.begin() as db:
            is_theirs = tasks.c.owner == owner
            return self._take_back(db, is_theirs, self._clock(), has_crashed=has_crashed)

    # --- looking after all --------------------------------------------------------------------

    def queue_state(self) -> QueueState:
        """Counts for metrics and for `Retry-After`."""
        with self._reader.connect() as db:
            queued, running, oldest = db.execute(_QUEUE_STATE).one()
        age = 0.0 if oldest is None else max(0.0, self._clock() - oldest)
        return QueueState(queued, running, age)

    def stored_bytes(self) -> Counter[str]:
        """What the tasks of each API key store, see ``redux_server.tasks.stored``."""
        with self._reader.connect() as db:
            return stored.by_key(db)

    def catch_up(self) -> int:
        """Mend times that lie further ahead than any is set; returns of how many tasks.

        They were written by a clock that was ahead and has been set back since: such a task would
        wait for hours, or for as long as younger ones come.
        """
        now = self._clock()
        ahead = now + CLOCKS_DIFFER_S
        waits, delay, lease = tasks.c.queued_at, tasks.c.not_before, tasks.c.lease_until
        kinds = (
            (waits > ahead, {"queued_at": now + (waits - now) * _TINY}),  # in the order they had
            (delay > ahead + LONGEST_DELAY_S, {"not_before": now}),
            (lease > ahead + self._lease_s, {"lease_until": now + self._lease_s}),
        )
        mended = 0
        with self._database.begin() as db:
            for is_ahead, values in kinds:
                free = select(tasks.c.id).where(is_ahead).with_for_update(skip_locked=True)
                found = update(tasks).where(tasks.c.id.in_(free)).values(values)
                mended += int(db.execute(found).rowcount)
        return mended

    def bound(self) -> dict[str, int]:
        """How many tasks wait in the queue, by the fingerprint they were accepted for."""
        query = (
            select(tasks.c.fingerprint, func.count()).where(IS_QUEUED).group_by(tasks.c.fingerprint)
        )
        with self._reader.connect() as db:
            return {fingerprint: found for fingerprint, found in db.execute(query)}

    def unbind(self, fingerprints: Collection[str]) -> int:
        """Let any worker take the open tasks accepted for one of ``fingerprints``; how many."""
        theirs = tasks.c.finished_at.is_(None), tasks.c.fingerprint.in_(fingerprints)
        with self._database.begin() as db:
            return int(db.execute(update(tasks).where(*theirs).values(fingerprint="")).rowcount)

    def due(self, *, waiting_s: float, limit: int, accepted_for: Collection[str] = ()) -> int:
        """How many tasks, counted up to ``limit``, a worker should have claimed by now.

        They wait for ``waiting_s`` seconds already, or their delay is over, or their lease. With
        ``accepted_for``, of those with one of these fingerprints.
        """
        now = self._clock()
        kinds = (
            tasks.c.queued_at <= now - waiting_s,
            tasks.c.not_before <= now - waiting_s,
            tasks.c.lease_until < now,
        )
        found = 0
        with self._reader.connect() as db:
            for kind in kinds:
                mine = claiming.fitting(accepted_for)
                some = select(tasks.c.id).where(kind, *mine).limit(limit).subquery()
                found += int(db.scalar(select(func.count()).select_from(some)) or 0)
        return min(found, limit)

    def ended_before(self, when: float, *, limit: int = 100) -> list[str]:
        """Ids of at most ``limit`` tasks that ended before ``when``, oldest first.

        Those whose webhook is still to be delivered are left out: it tells of their state.
        """
        is_to_be_told = exists().where(webhooks.c.task_id == tasks.c.id, webhooks.c.next_at >= 0)
        query = (
            select(tasks.c.id)
            .where(tasks.c.finished_at < when, ~is_to_be_told)
            .order_by(tasks.c.finished_at)
            .limit(limit)
        )
        with self._reader.connect() as db:
            return list(db.scalars(query))

    def _has_work(self, wanted: claiming.Wanted) -> bool:
        # The least of each, not any: PostgreSQL would look for any in the table, not in the index.
        priority = select(func.max(tasks.c.priority)).where(*wanted.ready)
        query = select(
            priority.scalar_subquery(), _least(tasks.c.lease_until), _least(tasks.c.not_before)
        )
        with self._reader.connect() as db:
            ready, expiry, due = db.execute(query).one()
        now = self._clock()
        is_expired = expiry is not None and expiry < now
        return ready is not None or is_expired or (due is not None and due <= now)

    def _back_to_the_queue(self, db: Connection, now: float) -> None:
        """Leases that ran out, and tasks whose delay is over."""
        self._take_back(db, tasks.c.lease_until < now, now)
        due = select(tasks.c.id).where(tasks.c.not_before <= now).with_for_update(skip_locked=True)
        back = {"queued_at": tasks.c.created_at, "not_before": None}
        db.execute(update(tasks).where(tasks.c.id.in_(due)).values(back))

    def _take_back(
        self,
        db: Connection,
        condition: ColumnElement[bool],
        now: float,
        *,
        has_crashed: bool = True,
        delay_s: float = 0.0,
        error: str = "",
    ) -> int:
        """End the leased tasks that are cancelled or have cost too much; queue the others again."""
        leased = select(tasks.c.id).where(IS_LEASED, condition).with_for_update(skip_locked=True)
        ids = list(db.scalars(leased))
        if not ids:
            return 0
        is_taken = tasks.c.id.in_(ids), IS_LEASED
        is_unwanted = tasks.c.cancel_requested_at >= 0
        taken = len(end(db, *is_taken, is_unwanted, outcome=Outcome.cancellation(), now=now))
        if has_crashed:
            is_poison = tasks.c.crashes + 1 >= self._max_attempts
            taken += len(end(db, *is_taken, is_poison, outcome=self._poisoned(error), now=now))
        # Back to its old place in the queue, not to its end.
        back = {"queued_at": tasks.c.created_at} if delay_s <= 0 else {"not_before": now + delay_s}
        suspect = {"crashes": tasks.c.crashes + 1, "shape": ""} if has_crashed else {}
        returned = db.execute(
            update(tasks).where(*is_taken).values(lease_until=None, owner=None, **back, **suspect)
        )
        return taken + int(returned.rowcount)

    def _poisoned(self, error: str) -> Outcome:
        reason = f"The worker stopped unexpectedly {self._max_attempts} times during this task."
        return Outcome.failure(Code.INTERNAL, error or reason)


def _least(column: Column[Any]) -> ScalarSelect[float]:
    return select(func.min(column)).where(column >= 0).scalar_subquery()
