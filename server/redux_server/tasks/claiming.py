"""Which task is next, and the lease that goes with it. Begins no transaction.

The queue is fair between API keys: of those that wait at the highest priority, the one is served
that has had the fewest seconds of device and fetching (see ``redux_server.tasks.usage``); then the
one whose last task started longest ago; then the one that waits longest. Within a key, tasks go in
the order accepted.

No statement reads more of the queue than one entry for each key that waits: the keys are found by
jumping in an index from each to the next. A claim costs the same before 100 waiting tasks as before
100,000.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, bindparam, func, select, update

from redux_server.database.tables import tasks
from redux_server.database.tables import usage as usage_table
from redux_server.tasks import usage
from redux_server.tasks.rows import COLUMNS, IS_QUEUED, task_of
from redux_server.tasks.task import Status, Task

_COLLISIONS = 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which tasks may be claimed.

    Of one ``shape`` (empty: of any), of no key in ``without``, none below ``priority``, with one of
    the fingerprints ``accepted_for`` (none: with any).
    """

    shape: str = ""
    without: frozenset[str] = frozenset()
    priority: int | None = None
    accepted_for: tuple[str, ...] = ()

    @property
    def ready(self) -> list[ColumnElement[bool]]:
        """The conditions that an index answers; ``without`` is no such one."""
        conditions = [IS_QUEUED, *fitting(self.accepted_for)]
        if self.shape:
            conditions.append(tasks.c.shape == self.shape)
        if self.priority is not None:
            conditions.append(tasks.c.priority >= self.priority)
        return conditions


def claim(db: Connection, wanted: Wanted, *, count: int, lease: dict[str, Any]) -> list[Task]:
    """Lease out the next task, and up to ``count - 1`` more of its shape and priority.

    Args:
        db: a connection in a transaction.
        wanted: which may be claimed.
        count: how many tasks at most.
        lease: what ``lease_values`` gave.

    Returns:
        The tasks; none when nothing that is wanted waits.
    """
    first = _claim_first(db, wanted, lease)
    claimed = [first] if first else []
    # A task without a shape is denoised alone.
    while claimed and claimed[0].shape and len(claimed) < count:
        mates = replace(wanted, shape=claimed[0].shape)
        mate = _claim_fairly(db, claimed[0].priority, mates, lease, [])
        if mate is None:
            break
        claimed.append(mate)
    return claimed


def lease_values(owner: str, now: float, lease_s: float) -> dict[str, Any]:
    """What a claim writes into a row."""
    return {
        "status": Status.PROCESSING,
        "owner": owner,
        "attempt": tasks.c.attempt + 1,
        "queued_at": None,
        "lease_until": now + lease_s,
        "started_at": now,
        "progress_step": 0,
        "charged_s": 0.0,
    }


def fitting(accepted_for: Collection[str]) -> list[ColumnElement[bool]]:
    """What a task has to meet to be taken by a worker of these fingerprints; of none, any is."""
    return [tasks.c.fingerprint.in_(sorted(accepted_for))] if accepted_for else []


def _claim_first(db: Connection, wanted: Wanted, lease: dict[str, Any]) -> Task | None:
    collided: list[str] = []
    for priority in _priorities(db, wanted):
        before = -1
        while before < len(collided) < _COLLISIONS:
            before = len(collided)
            task = _claim_fairly(db, priority, wanted, lease, collided)
            if task is not None:
                return task
    if not collided:
        return None
    # What is due are single tasks that others are just claiming. Better unfair than idle.
    return _claim_oldest(db, [*wanted.ready, tasks.c.key_id.not_in(wanted.without)], lease)


def _priorities(db: Connection, wanted: Wanted) -> Iterator[int]:
    """Those at which something waits, the highest first; each is looked for when it is needed."""
    below: list[ColumnElement[bool]] = []
    while True:
        priority = db.scalar(select(func.max(tasks.c.priority)).where(*wanted.ready, *below))
        if priority is None:
            return
        yield priority
        below = [tasks.c.priority < priority]


def _claim_fairly(
    db: Connection,
    priority: int,
    wanted: Wanted,
    lease: dict[str, Any],
    collided: list[str],
) -> Task | None:
    """The next task at ``priority``; None (and its key in ``collided``) if others hold it."""
    passed_over = [*wanted.without, *collided]
    values: dict[str, Any] = {
        "priority": priority,
        "shape": wanted.shape,
        "passed_over": passed_over,
    }
    values["accepted_for"] = sorted(wanted.accepted_for)
    query = _next_key(bool(wanted.shape), bool(passed_over), bool(wanted.accepted_for))
    key = db.execute(query, values).one_or_none()
    if key is None:
        return None
    ready = [IS_QUEUED, tasks.c.key_id == key.key_id, tasks.c.priority == priority]
    ready += fitting(wanted.accepted_for)
    if wanted.shape:
        ready.append(tasks.c.shape == wanted.shape)
    task = _claim_oldest(db, ready, {**lease, "charged_s": key.typical_s})
    if task is None:
        collided.append(key.key_id)
    elif not usage.charge(db, key.key_id, key.typical_s):
        db.execute(update(tasks).where(tasks.c.id == task.id).values(charged_s=0.0))
    return task


def _claim_oldest(
    db: Connection, ready: Sequence[ColumnElement[bool]], lease: dict[str, Any]
) -> Task | None:
    oldest = (
        select(tasks.c.id)
        .where(*ready)
        .order_by(tasks.c.queued_at)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    claimed = update(tasks).where(tasks.c.id == oldest).values(lease).returning(*COLUMNS)
    row = db.execute(claimed).one_or_none()
    return None if row is None else task_of(row)


@cache
def _next_key(has_shape: bool, has_passed_over: bool, is_choosy: bool) -> Select[Any]:
    """The key that is served next, and what a task of it typically costs.

    For the parameters ``priority``, ``shape``, ``passed_over`` (keys) and ``accepted_for``.
    """
    ready = [IS_QUEUED, tasks.c.priority == bindparam("priority")]
    if has_shape:
        ready.append(tasks.c.shape == bindparam("shape"))
    if is_choosy:
        ready.append(tasks.c.fingerprint.in_(bindparam("accepted_for", expanding=True)))
    # From each key that waits to the next: a loose index scan.
    waiting = select(func.min(tasks.c.key_id).label("key_id")).where(*ready)
    keys = waiting.cte("waiting", recursive=True)
    following = select(func.min(tasks.c.key_id)).where(*ready, tasks.c.key_id > keys.c.key_id)
    keys = keys.union_all(select(following.scalar_subquery()).where(keys.c.key_id.is_not(None)))
    is_theirs = tasks.c.key_id == keys.c.key_id
    latest = select(func.max(tasks.c.started_at)).where(is_theirs)
    oldest = select(func.min(tasks.c.queued_at)).where(*ready, is_theirs)
    typical = func.coalesce(usage_table.c.typical_s, usage.FIRST_GUESS_S).label("typical_s")
    candidates = (
        select(keys.c.key_id, typical)
        .select_from(keys.outerjoin(usage_table, usage_table.c.key_id == keys.c.key_id))
        .where(keys.c.key_id.is_not(None))
    )
    if has_passed_over:
        are_passed_over = keys.c.key_id.in_(bindparam("passed_over", expanding=True))
        candidates = candidates.where(~are_passed_over)
    return candidates.order_by(
        func.coalesce(usage_table.c.seconds, 0.0),
        func.coalesce(latest.scalar_subquery(), 0.0),
        oldest.scalar_subquery(),
        keys.c.key_id,
    ).limit(1)
