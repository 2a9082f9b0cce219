"""The API over real parts in a temporary folder, a clock to turn, and one live server."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from sqlalchemy import Engine

from e2e.live import LiveServer
from redux_server.app import build_app
from redux_server.auth import KeyRing
from redux_server.blobs import Blobs, Signer
from redux_server.coalescer import Coalescer
from redux_server.database import open_database
from redux_server.presence import Presence
from redux_server.services import Services
from redux_server.settings import ServerSettings
from redux_server.store import TaskStore


class Clock:
    """Unix seconds that pass only when told."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class IdleEngine:
    """An engine without workers: tasks stay where they are, and wakes are counted."""

    def __init__(self) -> None:
        self.is_started = False
        self.is_stopped = False
        self.wakes = 0

    async def start(self) -> None:
        self.is_started = True

    async def stop(self) -> None:
        self.is_stopped = True

    def wake(self) -> None:
        self.wakes += 1


class Api:
    """The app in this process: started, called and stopped in one event loop of its own."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.app = build_app(services)
        self.key = services.keys.create("test")
        self._runner = asyncio.Runner()
        self._lifespan = self.app.router.lifespan_context(self.app)
        self._runner.run(self._lifespan.__aenter__())

    def request(self, method: str, path: str, *, key: str | None = None, **more: Any) -> Any:
        """One request, with this API's key unless another (or ``""`` for none) is given."""
        key = self.key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= more.pop("headers", {})

        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, headers=headers, **more)

        return self._runner.run(call())

    def get(self, path: str, **more: Any) -> Any:
        return self.request("GET", path, **more)

    def post(self, path: str, **more: Any) -> Any:
        return self.request("POST", path, **more)

    def close(self) -> None:
        self._runner.run(self._lifespan.__aexit__(None, None, None))
        self._runner.close()


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
