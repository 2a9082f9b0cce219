"""How a database is opened, and what SQLite and PostgreSQL each need of their own.

SQLite is the embedded one: WAL mode with ``synchronous=FULL``, so that a commit survives a power
cut, and writers that wait their turn. PostgreSQL is the one that several machines share: every wait
has an end, so that a database that is away shows within seconds, as an error which callers know.
Knows no table.
"""

import errno
import os
import random
import re
import sqlite3
import time
import zlib
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from redux_server.private_files import private_file
from redux_server.settings import UsageError

# What a database says that is away, overloaded or out of space: it may be back at the next try.
DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeout)
LOCK_TIMEOUT_S = 30.0
POOL_SIZE = 5
POOL_OVERFLOW = 10
# libpq's parameters; a URL may set its own (?connect_timeout=10). Seconds, but for milliseconds in
# tcp_user_timeout and in options.
_TIMEOUTS: dict[str, Any] = {
    "application_name": "flux-redux",
    "connect_timeout": 4,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "options": "-c statement_timeout=20000 -c lock_timeout=10000"
    " -c idle_in_transaction_session_timeout=60000",
}
_BUSY_TIMEOUT = f"PRAGMA busy_timeout={LOCK_TIMEOUT_S * 1000:.0f}"
_WRONG_TABLES = ("42P01", "42703")  # undefined_table, undefined_column
_LACKS = re.compile(r"no such (table|column)|has no column named")
_jitter = random.Random()  # the global one is for whoever seeds it


class WrongTables(SQLAlchemyError):
    """The database answers, but lacks a table or a column that this version needs."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the database's tables are not those of this version of flux-redux ({reason}); stop "
            "its servers and workers, install one version everywhere, run `flux-redux db upgrade`, "
            "or restore the database from a backup"
        )


class DatabaseUnusable(UsageError):
    """A database that cannot be used as it is; the text says which, why and what to do."""


def connect(url: str) -> Engine:
    """A database that answers, whatever is in it.

    Raises:
        DatabaseUnusable: an unknown kind of URL, or nothing answers there.
        PermissionError: the SQLite file or its folder cannot be written.
    """
    parsed = parse(url)
    create = _sqlite_engine if parsed.get_backend_name() == "sqlite" else _postgres_engine
    try:
        database = create(parsed)
        event.listen(database, "handle_error", _tell_wrong_tables)
        with database.connect():
            return database
    except ImportError:
        raise DatabaseUnusable(
            f"{shown(parsed)} needs psycopg, which is not installed; "
            "run `pip install -c constraints.txt '.[cluster]'` in the project's folder"
        ) from None
    except DBAPIError as error:
        reason = str(error.orig).strip().split("\n")[0]
        raise DatabaseUnusable(
            f"cannot use {shown(parsed)}: {reason}; check --database-url, and that the database "
            "exists and lets this user in"
        ) from None


def parse(url: str) -> URL:
    """``url`` as an object, with the driver we use.

    Raises:
        DatabaseUnusable: it is no URL, or of a kind we do not use.
    """
    # A password's @ that was not written as %40 would end up in what we take for the host, and so
    # in messages.
    scheme = url.split("://")[0] if "://" in url else ""
    try:
        parsed = make_url(url.replace("postgres://", "postgresql://", 1))
        is_known = parsed.drivername in ("sqlite", "postgresql", "postgresql+psycopg")
    except (ArgumentError, ValueError):
        is_known = False
    if not is_known or url.count("@") > 1 or not parsed.database or parsed.database == ":memory:":
        raise DatabaseUnusable(
            f"--database-url must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/NAME, "
            f"with %40 for an @ in the password; the one given begins with {scheme!r} and is not"
        )
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


def shown(url: URL) -> str:
    """What may be told of a URL: no password, and no options, which can hold one too."""
    return url.set(query={}).render_as_string(hide_password=True)


def reader(database: Engine) -> Engine:
    """The same database for statements that only read: they never wait for a writer.

    On PostgreSQL each statement is a transaction of its own, without the messages of one.
    """
    if is_sqlite(database):
        return database.execution_options(redux_read_only=True)
    return database.execution_options(isolation_level="AUTOCOMMIT")


def is_sqlite(database: Engine | Connection) -> bool:
    """Whether this is the embedded database."""
    return database.dialect.name == "sqlite"


def take_turns(db: Connection, what: str) -> None:
    """Let one transaction at a time do ``what``, up to its end; the others wait here.

    SQLite has one writer as it is.
    """
    if db.dialect.name == "postgresql":
        db.execute(select(func.pg_advisory_xact_lock(zlib.crc32(what.encode()))))


def _tell_wrong_tables(context: Any) -> None:
    """Raise ``WrongTables`` for what is no trouble of a database that may be back in a moment.

    To SQLite that is an ``OperationalError``, as a disk that is full is; PostgreSQL has codes.
    """
    error = context.original_exception
    code = getattr(error, "sqlstate", None)
    text = str(error).split("\n")[0]
    if code in _WRONG_TABLES or (code is None and _LACKS.search(text)):
        raise WrongTables(text)


# --- SQLite ---------------------------------------------------------------------------------------


def _sqlite_engine(url: URL) -> Engine:
    """The database in the file of ``url``.

    A folder that is made for it and its files are readable by the owner only: they hold prompts,
    key digests and what signs URLs. SQLite gives its other files the mode of the first.
    """
    # Errors are logged, and parameters are prompts.
    database = create_engine(url, connect_args={"timeout": LOCK_TIMEOUT_S}, hide_parameters=True)
    path = Path(url.database or "")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "not writable", str(path))
    private_file(path)
    for name in (f"{path.name}-wal", f"{path.name}-shm"):
        if path.with_name(name).exists():
            private_file(path.with_name(name))
    event.listen(database, "connect", _configure_sqlite)
    event.listen(database, "begin", _begin_sqlite)
    return database


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _begin_sqlite, not by sqlite3
    _use_wal(connection)
    for pragma in (
        "synchronous=FULL",
        "foreign_keys=ON",
        "temp_store=MEMORY",  # not in the system's /tmp, which may be full
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
                time.sleep(_jitter.uniform(0.0005, 0.002))
    finally:
        connection.exec_driver_sql(_BUSY_TIMEOUT)


# --- PostgreSQL -----------------------------------------------------------------------------------


def _postgres_engine(url: URL) -> Engine:
    """The database at ``url``, a ``postgresql+psycopg`` one.

    A connection is tried before it is used (``pool_pre_ping``), so that a restarted database costs
    a reconnection and no error.

    Raises:
        ImportError: psycopg is not installed.
    """
    given = {name: value for name, value in _TIMEOUTS.items() if name not in url.query}
    return create_engine(
        url,
        connect_args=given,
        hide_parameters=True,  # errors are logged, and parameters are prompts
        pool_pre_ping=True,
        pool_size=POOL_SIZE,
        max_overflow=POOL_OVERFLOW,
        pool_timeout=10.0,
        pool_recycle=1800,
    )
