"""``flux-redux doctor`` on what several machines share: the database, and the engine's needs."""

from collections.abc import Iterator

from redux_server.database import DatabaseUnusable, open_database, shown
from redux_server.engines import check_engine
from redux_server.findings import Finding, Level
from redux_server.settings import ServerSettings, SettingsError


def check_cluster(settings: ServerSettings) -> Iterator[Finding]:
    """Whether a database that was named can be used, and ``--engine`` has what it needs."""
    if settings.database_url:
        try:
            engine = open_database(settings.database)
        except DatabaseUnusable as error:
            yield Finding(Level.MISSING, "database", str(error))
        else:
            yield Finding(Level.OK, "database", shown(engine.url))
            engine.dispose()
    if settings.engine != "local":
        try:
            check_engine(settings)
        except SettingsError as error:
            yield Finding(Level.MISSING, "engine", str(error))
        else:
            yield Finding(Level.OK, "engine", settings.engine)
