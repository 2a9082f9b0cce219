"""Which version a database's tables have, and how they are brought up to date, with alembic.

A change of the tables needs a revision in ``migrations/versions`` and its number here. Alembic's
own command line is not needed: the revisions lie inside the package, and the connection is handed
to ``migrations/env.py``. Knows no settings.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    MetaData,
    String,
    Table,
    func,
    insert,
    inspect,
    select,
    text,
)

from redux_server.database.connection import (
    DatabaseUnusable,
    connect,
    is_sqlite,
    reader,
    shown,
    take_turns,
)
from redux_server.database.tables import metadata, tasks

if TYPE_CHECKING:  # alembic takes its time to load, and a database that is up to date needs none
    from alembic.config import Config

SCHEMA_VERSION = "0007"  # the newest revision in migrations/versions; they are numbered upwards
FIRST_VERSION = "0001"  # what a database without a version is: it is older than they are
version = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))
_FOLDER = Path(__file__).parent / "migrations"


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
    database = connect(url)
    try:
        _have_our_tables(database)
    except BaseException:
        database.dispose()
        raise
    return database


def _have_our_tables(database: Engine) -> None:
    found = schema_version(database)
    if found == SCHEMA_VERSION:
        _refuse_gaps(database)
        return
    refuse_newer(database, found)
    if is_sqlite(database):
        _bring_up_to_date(database)
        return
    what = f"holds tables of version {found}" if found else "holds no tables yet"
    raise DatabaseUnusable(
        f"{shown(database.url)} {what}, and this version of flux-redux needs {SCHEMA_VERSION}; "
        "run `flux-redux db upgrade` with the same --database-url"
    )


def _refuse_gaps(database: Engine) -> None:
    """Stop before tables that say their version and are not what it has, as after half a restore.

    Raises:
        DatabaseUnusable: a table or a column is missing.
    """
    with reader(database).connect() as db:
        found = inspect(db).get_multi_columns()
    there = {(name, column["name"]) for (_, name), columns in found.items() for column in columns}
    needed = {(table.name, column.name) for table in metadata.sorted_tables for column in table.c}
    if missing := sorted(f"{table}.{column}" for table, column in needed - there):
        raise DatabaseUnusable(
            f"{shown(database.url)} says that its tables have version {SCHEMA_VERSION}, but lacks "
            f"{', '.join(missing[:5])}; restore it from a backup"
        )


def _bring_up_to_date(database: Engine) -> None:
    with database.begin() as db:  # holds the write lock: of several processes one does it
        if version_in(db):
            upgrade(db)
        else:
            metadata.create_all(db)
            version.create(db)
            db.execute(insert(version), {"version_num": SCHEMA_VERSION})


def schema_version(database: Engine) -> str:
    """The revision of the tables; empty when there are none."""
    with reader(database).connect() as db:
        return version_in(db)


def version_in(db: Connection) -> str:
    """The same, within a transaction."""
    names = inspect(db).get_table_names()
    if version.name in names:
        return str(db.scalar(select(func.max(version.c.version_num))) or "")
    return FIRST_VERSION if tasks.name in names else ""


def refuse_newer(database: Engine, found: str) -> None:
    """Stop before a database that a later version of us has changed.

    Raises:
        DatabaseUnusable: it is one.
    """
    if found > SCHEMA_VERSION:
        raise DatabaseUnusable(
            f"{shown(database.url)} holds tables of version {found}, newer than the "
            f"{SCHEMA_VERSION} that this version of flux-redux knows; install the newer "
            "flux-redux again"
        )


def upgrade_database(database: Engine) -> tuple[str, str]:
    """Bring the tables up to date in one transaction; returns the revisions before and after.

    Raises:
        DatabaseUnusable: the tables are newer than this version knows.
    """
    with database.begin() as db:
        take_turns(db, "upgrade")
        if not is_sqlite(db):
            db.execute(text("SET LOCAL statement_timeout = 0"))  # an index may take minutes
        before = version_in(db)
        refuse_newer(database, before)
        upgrade(db)
        return before, version_in(db)


def upgrade(db: Connection) -> None:
    """Bring the tables up to date within the transaction of ``db``."""
    from alembic import command

    config = _config()
    config.attributes["connection"] = db
    if version_in(db) == FIRST_VERSION and version.name not in inspect(db).get_table_names():
        command.stamp(config, FIRST_VERSION)
    command.upgrade(config, "head")


def revisions() -> list[str]:
    """All revisions there are, oldest first."""
    from alembic.script import ScriptDirectory

    found = ScriptDirectory.from_config(_config()).walk_revisions()
    return [script.revision for script in reversed(list(found))]


def _config() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    return config
