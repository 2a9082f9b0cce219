"""How many seconds of device and fetching each API key has had: what a fair claim goes by.

Start-time fair queueing: a key has a tag, its seconds so far, and the least tag is served first. A
key that comes back after a pause enters at the least tag of those that have open tasks, so a pause
earns no credit; and costs none. A claim charges what the key's tasks typically cost, the end of the
task puts in what it did cost. Source: Goyal, Vin, Cheng, "Start-time Fair Queuing", SIGCOMM 1996.

A row that another transaction holds is left as it is: a worker that froze must stop nobody, and one
charge more or less does no harm. Begins no transaction.
"""

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, func, insert, select, update

from redux_server.database.tables import keys, tasks, usage

FIRST_GUESS_S = 1.0
"""What a task of a key costs of which none has ended."""
LEAST_S = 0.01
_NEWEST = 0.3  # what the last task counts in what is typical


def enter(db: Connection, priorities: Mapping[str, int]) -> None:
    """Let keys without open tasks, given with their priorities, take their place among the others.

    Belongs before their tasks are inserted, and into a transaction that takes turns with others
    of its kind.
    """
    for priority in sorted(set(priorities.values())):
        ids = sorted(key_id for key_id, each in priorities.items() if each == priority)
        tag = db.execute(_least_tag_of_the_active(priority)).scalar()
        if tag is None:
            tag = db.execute(select(func.max(usage.c.seconds))).scalar() or 0.0
        known = set(db.scalars(select(usage.c.key_id).where(usage.c.key_id.in_(ids))))
        _set_unless_held(db, usage.c.key_id.in_(known) & (usage.c.seconds < tag), seconds=tag)
        new = [{"key_id": key_id, "seconds": tag} for key_id in ids if key_id not in known]
        if new:
            db.execute(insert(usage), new)


def charge(db: Connection, key_id: str, seconds: float) -> bool:
    """Add ``seconds`` to what the key has had; False if another transaction holds its row."""
    is_it = usage.c.key_id == key_id
    return _set_unless_held(db, is_it, seconds=usage.c.seconds + seconds) > 0


def settle(db: Connection, key_id: str, *, charged_s: float, cost_s: float) -> None:
    """Put what a task did cost in the place of what was charged for it."""
    typical = usage.c.typical_s * (1 - _NEWEST) + max(LEAST_S, cost_s) * _NEWEST
    _set_unless_held(
        db,
        usage.c.key_id == key_id,
        seconds=usage.c.seconds - charged_s + cost_s,
        typical_s=typical,
    )


def _set_unless_held(db: Connection, which: ColumnElement[bool], **values: object) -> int:
    free = select(usage.c.key_id).where(which).with_for_update(skip_locked=True)
    return int(db.execute(update(usage).where(usage.c.key_id.in_(free)).values(values)).rowcount)


def _least_tag_of_the_active(priority: int) -> Select[Any]:
    """Of the keys of ``priority`` that have open tasks."""
    is_open = tasks.c.finished_at.is_(None)
    # From each such key to the next: a loose index scan.
    active = select(func.min(tasks.c.key_id).label("key_id")).where(is_open)
    found = active.cte("active", recursive=True)
    following = select(func.min(tasks.c.key_id)).where(is_open, tasks.c.key_id > found.c.key_id)
    found = found.union_all(select(following.scalar_subquery()).where(found.c.key_id.is_not(None)))
    return (
        select(func.min(usage.c.seconds))
        .select_from(found)
        .join(usage, usage.c.key_id == found.c.key_id)
        .outerjoin(keys, keys.c.id == found.c.key_id)
        .where(func.coalesce(keys.c.priority, 0) == priority)
    )


def priorities_of(db: Connection, key_ids: Collection[str]) -> dict[str, int]:
    """The priority of each of ``key_ids``; 0 for one that is in no table."""
    query = select(keys.c.id, keys.c.priority).where(keys.c.id.in_(key_ids))
    stored = {id_: priority for id_, priority in db.execute(query)}
    return {key_id: stored.get(key_id, 0) for key_id in key_ids}
