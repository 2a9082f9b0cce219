"""The app in this process, called at once or over a port; a dispatch without workers; a clock."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp

from e2e.live import a_picture, data_uri
from redux_server.api.app import build_app
from redux_server.api.http_server import BoundedHttpProtocol
from redux_server.api.services import Services
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Outcome, Status, Task

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
URL = {"image": "https://example.com/a.png"}
INLINE = {"image": data_uri(a_picture())}


class Clock:
    """Unix seconds that pass only when told."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def end_next(store: TaskStore, outcome: Outcome) -> Task | None:
    """Claim the next task and end it so; None when none waits."""
    for task in store.claim("host/cpu"):
        assert store.finish(task.id, task.attempt, outcome)
        assert not store.finish(task.id, task.attempt, outcome)
        return task
    return None


def complete(store: TaskStore, outputs: Callable[[Task], list[str]] = lambda _: []) -> Task:
    """Claim the next task and record it as completed."""
    (task,) = store.claim("host/cpu")
    keys = outputs(task)
    outcome = Outcome(Status.COMPLETED, keys, [False] * len(keys), list(range(len(keys))))
    assert store.finish(task.id, task.attempt, outcome)
    return task


class IdleDispatch:
    """A dispatch without workers: tasks stay where they are, and wakes are counted."""

    failure = ""

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


def submit(api: Api, body: Any = URL, **more: Any) -> dict[str, Any]:
    """Submit a task; its prediction object."""
    response = api.post(SUBMIT, json=body, **more)
    assert response.status_code == 200, response.text
    data: dict[str, Any] = response.json()["data"]
    return data


def dispatch_of(api: Api) -> IdleDispatch:
    assert isinstance(api.services.dispatch, IdleDispatch)
    return api.services.dispatch


class Impatient(BoundedHttpProtocol):
    """Connections as a server has them, with little time for a head and for an unwanted body."""

    head_s = 0.5
    rest_s = 0.5


@contextmanager
def serving(app: ASGIApp) -> Iterator[int]:
    """``app`` on a loopback port, as ``serve`` would run it but for its patience."""
    config = uvicorn.Config(
        app, http=Impatient, ws="none", lifespan="off", log_config=None, access_log=False,
        timeout_keep_alive=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
