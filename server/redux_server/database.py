"""The tables, and how a database is opened. Knows no task logic.

Statements elsewhere are SQLAlchemy Core and name no dialect; what SQLite and PostgreSQL need of
their own is in ``redux_server.sqlite`` and ``redux_server.postgres``. A change of the tables needs
a revision in ``redux_server/migrations/versions`` and its number here.
"""

import zlib
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
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
    func,
    insert,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from redux_server import postgres, sqlite
from redux_server.settings import SettingsError

SCHEMA_VERSION = "0003"  # the newest revision in migrations/versions; they are numbered upwards
FIRST_VERSION = "0001"  # what a database without a version is: it is older than they are
# What a database says that is away, overloaded or out of space: it may be back at the next try.
DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeout)

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
    Index("tasks_queued", "queued_at"),
    Index("tasks_leased", "lease_until"),
    Index("tasks_delayed", "not_before"),
    Index("tasks_finished", "finished_at"),
    # What a fair claim reads (see claiming.py), each a few entries whatever the table's size: the
    # keys that wait at a priority, those with tasks of a shape, and each key's running and latest.
    Index("tasks_ready", "priority", "key_id", "queued_at", **_where("queued_at IS NOT NULL")),
    Index(
        "tasks_alike",
        "shape",
        "priority",
        "key_id",
        "queued_at",
        **_where("queued_at IS NOT NULL"),
    ),
    Index("tasks_running", "key_id", **_where("lease_until IS NOT NULL")),
    Index("tasks_started", "key_id", "started_at"),
    Index("tasks_open", "key_id", **_where("finished_at IS NULL")),  # for the bound of each key
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

workers = Table(
    "workers",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("device", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("detail", Text, nullable=False),
    Column("heartbeat_at", Float, nullable=False),
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

secrets = Table(
    "secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", String(128), nullable=False),
)

duties = Table(
    "duties",
    metadata,
    # What one process of all must do now and then; done_at is when one last took it on itself.
    Column("name", String(64), primary_key=True),
    Column("done_at", Float, nullable=False),
)

version = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))


class DatabaseUnusable(SettingsError):
    """A database that cannot be used as it is; the text says which, why and what to do."""


def open_database(url: str) -> Engine:
    """Open the database at ``url``: a ``sqlite:///`` path or a ``postgresql://`` URL.

    A SQLite file is made when there is none, and brought up to date when it is old: it is one
    user's, who should not have to know. PostgreSQL is only looked at, because several processes
    of several versions may be using it.

    Raises:
        DatabaseUnusable: an unknown kind of URL, nothing answers there, or its tables are older
            or newer than this version's.
        PermissionError: the SQLite file or its folder cannot be written.
    """
    engine = connect(url)
    try:
        _have_our_tables(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _have_our_tables(engine: Engine) -> None:
    found = schema_version(engine)
    if found == SCHEMA_VERSION:
        return
    refuse_newer(engine, found)
    if is_sqlite(engine):
        _bring_up_to_date(engine)
        return
    what = f"holds tables of version {found}" if found else "holds no tables yet"
    raise DatabaseUnusable(
        f"{shown(engine.url)} {what}, and this version of flux-redux needs {SCHEMA_VERSION}; "
        "run `flux-redux db upgrade` with the same --database-url"
    )


def connect(url: str) -> Engine:
    """An engine whose database answers, whatever is in it.

    Raises:
        DatabaseUnusable: an unknown kind of URL, or nothing answers there.
        PermissionError: the SQLite file or its folder cannot be written.
    """
    parsed = parse(url)
    create = sqlite.create if parsed.get_backend_name() == "sqlite" else postgres.create
    try:
        engine = create(parsed)
        with engine.connect():
            return engine
    except ImportError:
        raise DatabaseUnusable(
            f"{shown(parsed)} needs psycopg, which is not installed; "
            "run `pip install 'flux-redux-server[cluster]'`"
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


def reader(engine: Engine) -> Engine:
    """The same database for statements that only read: they never wait for a writer.

    On PostgreSQL each statement is a transaction of its own, without the messages of one.
    """
    if is_sqlite(engine):
        return engine.execution_options(redux_read_only=True)
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def is_sqlite(engine: Engine | Connection) -> bool:
    """Whether this is the embedded database."""
    return engine.dialect.name == "sqlite"


def take_turns(db: Connection, what: str) -> None:
    """Let one transaction at a time do ``what``, up to its end; the others wait here.

    SQLite has one writer as it is.
    """
    if db.dialect.name == "postgresql":
        db.execute(select(func.pg_advisory_xact_lock(zlib.crc32(what.encode()))))


def schema_version(engine: Engine) -> str:
    """The revision of the tables; empty when there are none."""
    with reader(engine).connect() as db:
        return version_in(db)


def version_in(db: Connection) -> str:
    """The same, within a transaction."""
    names = inspect(db).get_table_names()
    if version.name in names:
        return str(db.scalar(select(func.max(version.c.version_num))) or "")
    return FIRST_VERSION if tasks.name in names else ""


def refuse_newer(engine: Engine, found: str) -> None:
    """Stop before a database that a later version of us has changed.

    Raises:
        DatabaseUnusable: it is one.
    """
    if found > SCHEMA_VERSION:
        raise DatabaseUnusable(
            f"{shown(engine.url)} holds tables of version {found}, newer than the {SCHEMA_VERSION} "
            "that this version of flux-redux knows; install the newer flux-redux again"
        )


def _bring_up_to_date(engine: Engine) -> None:
    with engine.begin() as db:  # holds the write lock: of several processes one does it
        if version_in(db):
            from redux_server.migration import upgrade  # alembic takes its time to load

            upgrade(db)
        else:
            metadata.create_all(db)
            version.create(db)
            db.execute(insert(version), {"version_num": SCHEMA_VERSION})
