"""SQLite as the embedded database: durable commits, and writers that wait their turn.

WAL mode with ``synchronous=FULL``: a commit survives a power cut. Knows no table.
"""

import errno
import os
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import OperationalError

LOCK_TIMEOUT_S = 30.0
_jitter = random.Random()  # the global one is for whoever seeds it
_BUSY_TIMEOUT = f"PRAGMA busy_timeout={LOCK_TIMEOUT_S * 1000:.0f}"


def create(url: URL) -> Engine:
    """An engine for the file of ``url``.

    Its folder is created readable by the owner only: the file holds prompts and key digests.
    """
    # Errors are logged, and parameters are prompts.
    engine = create_engine(url, connect_args={"timeout": LOCK_TIMEOUT_S}, hide_parameters=True)
    path = Path(url.database or "")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "not writable", str(path))
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _begin, not by sqlite3
    _use_wal(connection)
    for pragma in (
        "synchronous=FULL",
        "foreign_keys=ON",
        "journal_size_limit=67108864",
    ):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(_BUSY_TIMEOUT)


def _use_wal(connection: Any) -> None:
    """Switch to a write-ahead log; SQLite does not wait when another process is at the same."""
    ends_at = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > ends_at:
                raise
            time.sleep(_jitter.uniform(0.001, 0.01))


def _begin(connection: Connection) -> None:
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
                time.sleep(_jitter.uniform(0.0005, 0.002))
    finally:
        connection.exec_driver_sql(_BUSY_TIMEOUT)
