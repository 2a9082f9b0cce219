"""The API over real parts in a temporary folder, a clock to turn, and one live server."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import Engine

from e2e.live import LiveServer
from redux_server.auth import KeyRing
from redux_server.blobs import Blobs, Signer
from redux_server.coalescer import Coalescer
from redux_server.database import open_database
from redux_server.presence import Presence
from redux_server.services import Services
from redux_server.settings import ServerSettings
from redux_server.store import TaskStore
from server.in_process import Api, Clock, IdleEngine


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


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path / 'data' / 'tasks.db'}")
    yield engine
    engine.dispose()


@pytest.fixture
def build_services(tmp_path: Path, database: Engine) -> Callable[..., Services]:
    """Parts over a temporary folder; keywords are settings."""

    def build(**settings: Any) -> Services:
        given = ServerSettings(data_dir=tmp_path / "data", model="fake", **settings)
        store = TaskStore(database, lease_s=given.lease_s, max_attempts=given.max_attempts)
        return Services(
            settings=given,
            store=store,
            accept=Coalescer(lambda new: store.accept(new, max_open=given.max_queue), name="in"),
            find=Coalescer(store.get, name="find"),
            keys=KeyRing(database),
            presence=Presence(database),
            blobs=Blobs(given.blobs_dir),
            signer=Signer(b"secret", clock=time.time),
            engine=IdleEngine(),
        )

    return build


@pytest.fixture
def build_api(build_services: Callable[..., Services]) -> Iterator[Callable[..., Api]]:
    """Started APIs; keywords are settings, ``services`` replaces the parts."""
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
    with LiveServer(data_dir, "--fetch-allow", "127.0.0.1", "--log-level", "debug") as server:
        yield server
