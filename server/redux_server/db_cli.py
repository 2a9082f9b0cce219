"""``flux-redux db``: which tables a database has, and bringing them up to date."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine

from redux_server.database import SCHEMA_VERSION, connect, schema_version, shown
from redux_server.migration import upgrade_database
from redux_server.settings import ServerSettings


def current(settings: ServerSettings) -> int:
    """Print the version of the tables and the one this program needs; 1 when they differ."""
    with _database(settings) as engine:
        found = schema_version(engine)
        print(f"{shown(engine.url)}: {found or 'no tables'} (this flux-redux: {SCHEMA_VERSION})")
    return 0 if found == SCHEMA_VERSION else 1


def upgrade(settings: ServerSettings) -> int:
    """Bring the tables up to date; all of it or nothing."""
    with _database(settings) as engine:
        before, after = upgrade_database(engine)
        done = "is up to date" if before == after else f"upgraded from {before or 'nothing'}"
        print(f"{shown(engine.url)}: {after}, {done}")
    return 0


@contextmanager
def _database(settings: ServerSettings) -> Iterator[Engine]:
    engine = connect(settings.database)
    try:
        yield engine
    finally:
        engine.dispose()
