"""A task as a row: conditions on it, how it is read, how it is ended. Begins no transaction."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, ScalarSelect, func, insert, select, update

from redux_server.database.tables import tasks, webhooks
from redux_server.tasks.stored import note, row_bytes
from redux_server.tasks.task import NewTask, Outcome, Status, Task

COLUMNS = tuple(tasks.c[name] for name in Task.__slots__)
# Not IS NOT NULL, for which SQLite reads the whole table instead of the index.
IS_QUEUED = tasks.c.queued_at >= 0
IS_LEASED = tasks.c.lease_until >= 0
IS_DELAYED = tasks.c.not_before >= 0
_OF_ENDED = tuple(
    tasks.c[name]
    for name in ("id", "key_id", "webhook_url", "charged_s", "attempt", "output_bytes")
)
_TOLD_OF = (Status.COMPLETED, Status.FAILED)


def count(condition: ColumnElement[bool]) -> ScalarSelect[int]:
    """How many tasks meet ``condition``."""
    return select(func.count()).where(condition).select_from(tasks).scalar_subquery()


def new_row(new: NewTask, *, priority: int, now: float) -> dict[str, Any]:
    """The values of a task that is being accepted at ``now``."""
    return {
        "id": new.id,
        "key_id": new.key_id,
        "model": new.model,
        "status": Status.CREATED,
        "input": new.input,
        "request_id": new.request_id,
        "created_at": now,
        "queued_at": now,
        "priority": priority,
        "shape": new.shape,
        "webhook_url": new.webhook_url,
        "fingerprint": new.fingerprint,
        "stored_bytes": new_bytes(new),
        "output_bytes": new.output_bytes,
    }


def new_bytes(new: NewTask) -> int:
    """What a task counts while it is open."""
    return row_bytes(new.input) + new.picture_bytes + new.output_bytes


def task_from(values: Mapping[str, Any]) -> Task:
    """The task that ``new_row`` described."""
    given = {name: values[name] for name in Task.__slots__ if name in values}
    defaults: dict[str, Any] = {
        "started_at": None,
        "finished_at": None,
        "attempt": 0,
        "crashes": 0,
        "progress_step": 0,
        "outcome": None,
    }
    return Task(**{**defaults, **given})


def task_of(row: Row[Any]) -> Task:
    """The task in a row of ``COLUMNS``."""
    values = dict(row._mapping)
    values["status"] = Status(values["status"])
    if values["outcome"] is not None:
        outcome = values["outcome"]
        values["outcome"] = Outcome(**{**outcome, "status": Status(outcome["status"])})
    return Task(**values)


def end(
    db: Connection,
    *which: ColumnElement[bool],
    outcome: Outcome,
    now: float,
    kept_bytes: int | None = None,
) -> Sequence[Row[Any]]:
    """End the tasks that meet all of ``which``; returns the ``key_id`` and ``charged_s`` of each.

    Whoever asked for a webhook has it in the outbox with the same commit: there is no end without
    its message, and no message without an end. ``kept_bytes`` is what their images count from now
    on; None where nobody can tell: then each of their attempts may have left all it could.
    """
    kept = tasks.c.attempt * tasks.c.output_bytes if kept_bytes is None else kept_bytes
    ended = db.execute(
        update(tasks)
        .where(*which)
        .values(
            status=outcome.status,
            outcome=asdict(outcome),
            finished_at=now,
            queued_at=None,
            lease_until=None,
            not_before=None,
            stored_bytes=tasks.c.stored_bytes - tasks.c.output_bytes + kept,
        )
        .returning(*_OF_ENDED)
    ).all()
    changes: Counter[str] = Counter()
    for row in ended:
        unknown = row.attempt * row.output_bytes
        changes[row.key_id] += (unknown if kept_bytes is None else kept_bytes) - row.output_bytes
    note(db, changes)
    messages = [
        {"task_id": row.id, "key_id": row.key_id, "url": row.webhook_url}
        | {"created_at": now, "next_at": now}
        for row in ended
        if row.webhook_url and outcome.status in _TOLD_OF
    ]
    if messages:
        db.execute(insert(webhooks), messages)
    return ended
