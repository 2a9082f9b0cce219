"""The tables, and how a database is opened. Knows no task logic.

SQLite in WAL mode with ``synchronous=FULL``: a commit survives a power cut. Statements elsewhere
are SQLAlchemy Core and name no dialect.
"""

import errno
import os
import random
import time
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy.exc import OperationalError

LOCK_TIMEOUT_S = 30.0
_BUSY_TIMEOUT = f"PRAGMA busy_timeout={LOCK_TIMEOUT_S * 1000:.0f}"

metadata = MetaData()

tasks = Table(
    "tasks",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("model", String(128), nullable=False),
    Column("status", String(16), nullable=False),
    Column("input", JSON, nullable=False),
    Column("request_id", String(128), nullable=False),
    # Times are Unix seconds. queued_at is set while the task waits and orders the queue;
    # lease_until is set while a worker holds it. A task has at most one of the two.
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
    Index("tasks_queued", "queued_at"),
    Index("tasks_leased", "lease_until"),
    Index("tasks_finished", "finished_at"),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("device", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("detail", Text, nullable=False),
    Column("heartbeat_at", Float, nullable=False),
)

secrets = Table(
    "secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", String(128), nullable=False),
)


def open_database(url: str) -> Engine:
    """Open (and create, if new) the database at ``url``, a ``sqlite:///`` path.

    Its folder is created readable by the owner only: the file holds prompts and key digests.
    """
    engine = create_engine(url, connect_args={"timeout": LOCK_TIMEOUT_S})
    path = Path(engine.url.database or "")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "not writable", str(path))
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    metadata.create_all(engine)
    return engine


def reader(engine: Engine) -> Engine:
    """The same database for statements that only read: they never wait for a writer."""
    return engine.execution_options(redux_read_only=True)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _begin_sqlite, not by sqlite3
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "journal_size_limit=67108864",
    ):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(_BUSY_TIMEOUT)


def _begin_sqlite(connection: Connection) -> None:
    if connection.get_execution_options().get("redux_read_only"):
        connection.exec_driver_sql("BEGIN")
        return
    # A deferred transaction that turns into a writer fails at once when another one writes;
    # taking the write lock first makes it wait its turn instead. SQLite's own way of waiting looks
    # ever more rarely, up to ten times a second: busy writers would starve the one that waits.
    ends_at = time.monotonic() + LOCK_TIMEOUT_S
    connection.exec_driver_sql("PRAGMA busy_timeout=0")
    try:
        while True:
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                return
            except OperationalError as error:
                if "locked" not in str(error.orig) or time.monotonic() > ends_at:
                    raise
                time.sleep(random.uniform(0.0005, 0.002))
    finally:
        connection.exec_driver_sql(_BUSY_TIMEOUT)
