"""The tables. Knows no task logic.

Statements elsewhere are SQLAlchemy Core and name no dialect; what SQLite and PostgreSQL need of
their own is in ``redux_server.database.connection``. A change of the tables needs a revision, see
``redux_server.database.migration``.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData()


def _where(condition: str) -> dict[str, Any]:
    """Options of an index over the rows that meet ``condition``, in each dialect's words."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


tasks = Table(
    "tasks",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("model", String(128), nullable=False),
    Column("status", String(16), nullable=False),
    Column("input", JSON, nullable=False),
    Column("request_id", String(128), nullable=False),
    # Times are Unix seconds. queued_at is set while the task may be claimed and orders the queue;
    # lease_until is set while a worker holds it; not_before while it waits to come back to the
    # queue. An open task has exactly one of the three, an ended one none.
    Column("created_at", Float, nullable=False),
    Column("queued_at", Float),
    Column("lease_until", Float),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("owner", String(128)),
    # attempt numbers every start and fences results; crashes counts those whose worker was lost.
    Column("attempt", Integer, nullable=False, default=0),
    Column("crashes", Integer, nullable=False, default=0),
    Column("progress_step", Integer, nullable=False, default=0),
    Column("outcome", JSON),
    # Higher goes first. What may be denoised together has the same shape; without one, a task is
    # denoised alone.
    Column("priority", Integer, nullable=False, default=0, server_default="0"),
    Column("shape", String(64), nullable=False, default="", server_default=""),
    Column("not_before", Float),
    Column("cancel_requested_at", Float),  # while a worker holds it, or did at its end
    Column("webhook_url", Text),
    # Of the workers for which it was accepted (see dispatch/fingerprint.py); empty: of any.
    Column("fingerprint", String(64), nullable=False, default="", server_default=""),
    # What the last claim charged its key for it, see tasks/usage.py.
    Column("charged_s", Float, nullable=False, default=0.0, server_default="0"),
    # What its key has stored by it, see tasks/stored.py; of that, while it is open, what the images
    # to come may take.
    Column("stored_bytes", BigInteger, nullable=False, default=0, server_default="0"),
    Column("output_bytes", BigInteger, nullable=False, default=0, server_default="0"),
    Index("tasks_queued", "queued_at"),
    Index("tasks_leased", "lease_until"),
    Index("tasks_delayed", "not_before"),
    Index("tasks_finished", "finished_at"),
    # What a fair claim reads (see tasks/claiming.py), each a few entries whatever the table's size:
    # the keys that wait at a priority, those with tasks of a shape, and each key's running and
    # latest.
    Index("tasks_ready", "priority", "key_id", "queued_at", **_where("queued_at IS NOT NULL")),
    Index(
        "tasks_alike",
        "shape",
        "priority",
        "key_id",
        "queued_at",
        **_where("queued_at IS NOT NULL"),
    ),
    Index("tasks_bound", "fingerprint", **_where("queued_at IS NOT NULL")),
    Index("tasks_running", "key_id", **_where("lease_until IS NOT NULL")),
    Index("tasks_started", "key_id", "started_at"),
    # For the bound of each key; with finished_at, or SQLite may choose one that has all tasks.
    Index("tasks_open", "key_id", "finished_at", **_where("finished_at IS NULL")),
    # A key's tasks, newest first; with the status, so that those of a rare one are found in it.
    Index("tasks_listed", "key_id", "created_at", "id", "status"),
)
keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("priority", Integer, nullable=False, default=0, server_default="0"),  # of its tasks
)
usage = Table(
    "usage",
    metadata,
    # What an API key has had, and what a task of it costs; both in seconds of device and fetching.
    Column("key_id", String(64), primary_key=True),
    Column("seconds", Float, nullable=False, default=0.0, server_default="0"),
    Column("typical_s", Float, nullable=False, default=1.0, server_default="1"),
)
stored = Table(
    "stored",
    metadata,
    # What the tasks of an API key store is the sum of its rows: one for each change since they were
    # last added up. See tasks/stored.py.
    Column("id", String(32), primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Index("stored_by_key", "key_id", "size_bytes"),
)
uploads = Table(
    "uploads",
    metadata,
    # stored_at is empty while the file is announced or on its way; until expires_at it counts.
    Column("id", String(32), primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("blob", String(128), nullable=False),
    Column("filename", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("stored_at", Float),
    Index("uploads_listed", "key_id", "created_at", "id", "size_bytes"),
    Index("uploads_expires", "expires_at"),
)
workers = Table(
    "workers",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("device", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("detail", Text, nullable=False),
    Column("heartbeat_at", Float, nullable=False),
    # What it runs, once it is ready: for people, and to be compared with a task's.
    Column("model", String(128), nullable=False, default="", server_default=""),
    Column("fingerprint", String(64), nullable=False, default="", server_default=""),
)
idempotency = Table(
    "idempotency",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("digest", String(64), nullable=False),  # of the request that came with it first
    Column("task_id", String(32), nullable=False),
    Column("created_at", Float, nullable=False),
    Index("idempotency_created", "created_at"),
)
webhooks = Table(
    "webhooks",
    metadata,
    # The outbox: written with a task's end, in one transaction. next_at is when to try (again);
    # it is empty once the delivery ended, well or not.
    Column("task_id", String(32), primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("url", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("next_at", Float),
    Column("tries", Integer, nullable=False, default=0),
    Column("delivered_at", Float),
    Column("error", Text, nullable=False, default=""),
    Index("webhooks_next", "next_at"),
)
previews = Table(
    "previews",
    metadata,
    # The last preview of a task that is worked on, or that somebody wants them: jpeg is empty then.
    Column("task_id", String(32), primary_key=True),
    Column("attempt", Integer),
    Column("step", Integer),
    Column("image", Integer),
    Column("jpeg", LargeBinary),
    Column("made_at", Float, nullable=False),
)
secrets = Table(
    "secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", String(128), nullable=False),
)
turns = Table(
    "duties",  # its name since revision 0002
    metadata,
    # What one process of all must do now and then; done_at is when one last took its turn at it.
    Column("name", String(64), primary_key=True),
    Column("done_at", Float, nullable=False),
)
