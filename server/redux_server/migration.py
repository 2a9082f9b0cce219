"""Brings a database's tables up to date, with alembic. Knows no settings.

Alembic's own command line is not needed: the revisions lie in ``migrations/versions`` inside the
package, and the connection is handed to ``migrations/env.py``.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from redux_server.database import (
    FIRST_VERSION,
    is_sqlite,
    refuse_newer,
    take_turns,
    version,
    version_in,
)

_FOLDER = Path(__file__).parent / "migrations"


def upgrade_database(engine: Engine) -> tuple[str, str]:
    """Bring the tables up to date in one transaction; returns the revisions before and after.

    Raises:
        DatabaseUnusable: the tables are newer than this version knows.
    """
    with engine.begin() as db:
        take_turns(db, "upgrade")
        if not is_sqlite(db):
            db.execute(text("SET LOCAL statement_timeout = 0"))  # an index may take minutes
        before = version_in(db)
        refuse_newer(engine, before)
        upgrade(db)
        return before, version_in(db)


def upgrade(db: Connection) -> None:
    """Bring the tables up to date within the transaction of ``db``."""
    config = _config()
    config.attributes["connection"] = db
    if version_in(db) == FIRST_VERSION and version.name not in inspect(db).get_table_names():
        command.stamp(config, FIRST_VERSION)
    command.upgrade(config, "head")


def revisions() -> list[str]:
    """All revisions there are, oldest first."""
    found = ScriptDirectory.from_config(_config()).walk_revisions()
    return [script.revision for script in reversed(list(found))]


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    return config
