"""The app in this process, an engine that does nothing, and a clock to turn."""

import asyncio
from typing import Any

import httpx

from redux_server.api.app import build_app
from redux_server.api.services import Services
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Outcome, Task


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


class IdleDispatch:
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
