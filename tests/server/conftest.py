"""The API over real parts in a temporary folder, a clock to turn, and one live server."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import Engine, text

from e2e.live import LiveServer
from redux_server.api.services import Services, assemble
from redux_server.database.migration import open_database
from redux_server.database.tables import metadata
from redux_server.settings import ServerSettings
from redux_server.storage.opening import open_pictures
from server.api_stub import Stub
from server.full_disk import small_file_system
from server.in_process import Api, Clock, IdleDispatch
from server.worker_bench import Bench
from threaded import answering


@pytest.fixture(scope="session", autouse=True)
def _plain_log_lines() -> None:
    """Without structlog's drawing of tracebacks, which takes seconds for a deep one."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(),
        ]
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with our tables and nothing in them, to be copied: making them takes longest."""
    path = tmp_path_factory.mktemp("new") / "tasks.db"
    open_database(f"sqlite:///{path}").dispose()
    return path


@pytest.fixture
def database(tmp_path: Path, new_database: Path) -> Iterator[Engine]:
    (tmp_path / "data").mkdir(exist_ok=True)
    path = shutil.copy(new_database, tmp_path / "data" / "tasks.db")
    engine = open_database(f"sqlite:///{path}")
    yield engine
    engine.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.cluster)])
def either_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty database of each kind by turns."""
    if request.param == "sqlite":
        path = shutil.copy(request.getfixturevalue("new_database"), tmp_path / "tasks.db")
        engine = open_database(f"sqlite:///{path}")
    else:
        engine = open_database(request.getfixturevalue("postgres_url"))
        names = ", ".join(metadata.tables)
        with engine.begin() as db:
            db.execute(text(f"TRUNCATE {names}"))
    yield engine
    engine.dispose()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 12 MiB."""
    with small_file_system(tmp_path) as folder:
        yield folder


@pytest.fixture
def bench(database: Engine, tmp_path: Path, clock: Clock) -> Bench:
    """Where workers can be put to work."""
    return Bench(database, tmp_path / "blobs", clock)


@pytest.fixture
def build_services(tmp_path: Path, database: Engine) -> Callable[..., Services]:
    """Services over a temporary folder; keywords are settings."""

    def build(**settings: Any) -> Services:
        # No floor, hence no ballast: hundreds of tests would keep one each.
        settings = {"min_free_disk": 0, "model": "fake", **settings}
        given = ServerSettings(data_dir=tmp_path / "data", **settings)
        services = assemble(given, database, open_pictures(given))
        services.poller.every_s = 0.01
        services.fleet.every_s = 0.0
        return replace(services, dispatch=IdleDispatch())

    return build


@pytest.fixture
def build_api(build_services: Callable[..., Services]) -> Iterator[Callable[..., Api]]:
    """Started APIs, over ``services`` or over new ones; keywords are settings."""
    apis: list[Api] = []

    def build(services: Services | None = None, **settings: Any) -> Api:
        apis.append(Api(services or build_services(**settings)))
        return apis[-1]

    yield build
    for api in apis:
        api.close()


@pytest.fixture
def api(build_api: Callable[..., Api]) -> Api:
    return build_api()


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A live server with plain-coloured pictures that may fetch from this machine."""
    data_dir = tmp_path_factory.mktemp("live") / "data"
    with LiveServer(data_dir, "--fetch-allow", "127.0.0.1:*", "--log-level", "debug") as server:
        yield server


@pytest.fixture
def stub() -> Iterator[Stub]:
    """What a client meets instead of the server."""
    with answering(Stub()) as server:
        try:
            yield server
        finally:
            server.is_over.set()


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch, api: Api) -> list[str]:
    """The keys of all pictures that were stored, for however short a time."""
    keys: list[str] = []
    put = type(api.services.blobs).put

    def noting(blobs: Any, key: str, data: bytes) -> None:
        keys.append(key)
        put(blobs, key, data)

    monkeypatch.setattr(type(api.services.blobs), "put", noting)
    return keys
