"""Which task is next, and the lease that goes with it. Begins no transaction.

The queue is fair between API keys: of those that wait at the highest priority, the one with the
fewest tasks running is served; then the one whose last task started longest ago; then the one that
waits longest. Within a key, tasks go in the order accepted.

No statement reads more of the queue than one entry for each key that waits: the keys are found by
jumping in an index from each to the next. A claim costs the same before 100 waiting tasks as before
100,000.
"""

from collections.abc import Collection
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, bindparam, func, select, update

from redux_server.database.tables import tasks
from redux_server.tasks.rows import COLUMNS, IS_LEASED, IS_QUEUED, task_of
from redux_server.tasks.task import Status, Task

_COLLISIONS = 3


def claim(
    db: Connection,
    *,
    count: int,
    shape: str,
    lease: dict[str, Any],
    accepted_for: Collection[str] = (),
) -> list[Task]:
    """Lease out the next task, and up to ``count - 1`` more of its shape and priority.

    Args:
        db: a connection in a transaction.
        count: how many tasks at most.
        shape: if not empty, tasks of this shape only.
        lease: what ``lease_values`` gave.
        accepted_for: if not empty, tasks with one of these fingerprints only.

    Returns:
        The tasks; none when nothing (of that shape) waits.
    """
    first = _claim_first(db, shape, lease, accepted_for)
    claimed = [first] if first else []
    # A task without a shape is denoised alone.
    while claimed and claimed[0].shape and len(claimed) < count:
        mate = _claim_fairly(
            db, claimed[0].priority, claimed[0].shape, lease, accepted_for=accepted_for
        )
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
    }


def fitting(accepted_for: Collection[str]) -> list[ColumnElement[bool]]:
    """What a task has to meet to be taken by a worker of these fingerprints; of none, any is."""
    return [tasks.c.fingerprint.in_(sorted(accepted_for))] if accepted_for else []


def _claim_first(
    db: Connection, shape: str, lease: dict[str, Any], accepted_for: Collection[str]
) -> Task | None:
    ready = [IS_QUEUED, tasks.c.shape == shape] if shape else [IS_QUEUED]
    ready += fitting(accepted_for)
    collided: list[str] = []
    for _ in range(_COLLISIONS):
        priority = db.scalar(select(func.max(tasks.c.priority)).where(*ready))
        if priority is None:
            return None
        task = _claim_fairly(db, priority, shape, lease, collided, accepted_for=accepted_for)
        if task is not None:
            return task
    # What is due are single tasks that others are just claiming. Better unfair than idle.
    return _claim_oldest(db, ready, lease)


def _claim_fairly(
    db: Connection,
    priority: int,
    shape: str,
    lease: dict[str, Any],
    collided: list[str] | None = None,
    *,
    accepted_for: Collection[str] = (),
) -> Task | None:
    """The next task at ``priority``; None (and its key in ``collided``) if others hold it."""
    collided = [] if collided is None else collided
    values = {"priority": priority, "shape": shape, "collided": collided}
    values["accepted_for"] = sorted(accepted_for)
    query = _next_key(bool(shape), bool(collided), bool(accepted_for))
    key_id = db.scalar(query, values)
    if key_id is None:
        return None
    ready = [IS_QUEUED, tasks.c.key_id == key_id, tasks.c.priority == priority]
    ready += fitting(accepted_for)
    if shape:
        ready.append(tasks.c.shape == shape)
    task = _claim_oldest(db, ready, lease)
    if task is None:
        collided.append(key_id)
    return task


def _claim_oldest(
    db: Connection, ready: list[ColumnElement[bool]], lease: dict[str, Any]
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
def _next_key(has_shape: bool, has_collided: bool, is_choosy: bool) -> Select[Any]:
    """The key that is served next.

    For the parameters ``priority``, ``shape``, ``collided`` and ``accepted_for``.
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
    running = select(func.count()).select_from(tasks).where(IS_LEASED, is_theirs)
    latest = select(func.max(tasks.c.started_at)).where(is_theirs)
    oldest = select(func.min(tasks.c.queued_at)).where(*ready, is_theirs)
    candidates = select(keys.c.key_id).where(keys.c.key_id.is_not(None))
    if has_collided:
        are_held = keys.c.key_id.in_(bindparam("collided", expanding=True))
        candidates = candidates.where(~are_held)
    return candidates.order_by(
        running.scalar_subquery(),
        func.coalesce(latest.scalar_subquery(), 0.0),
        oldest.scalar_subquery(),
        keys.c.key_id,
    ).limit(1)
