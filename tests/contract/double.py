"""The real app behind a double that spoils its answers: one port for each way to spoil them.

Tasks are over when they are asked for: with each submit the next waiting task is completed.
"""

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from e2e.live import a_picture
from redux_server.api.app import build_app
from redux_server.api.services import assemble
from redux_server.database.migration import open_database
from redux_server.settings import ServerSettings
from redux_server.storage.opening import open_pictures
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Outcome, Status
from server.in_process import IdleDispatch, end_next

OUTPUT = "output/1/0.png"
DONE = Outcome(Status.COMPLETED, [OUTPUT], [False], [7], {"inference": 12})

Json = dict[str, Any]


@dataclass(frozen=True)
class Mutation:
    """One way to spoil an answer; ``spoil`` gets the whole body and may change it in place."""

    name: str
    spoil: Callable[[Json], None]
    status: int = 200


def without(*path: str) -> Callable[[Json], None]:
    """Leave a field out."""

    def spoil(body: Json) -> None:
        holder, name = _find(body, path)
        del holder[name]

    return spoil


def with_value(*path: str, value: Any) -> Callable[[Json], None]:
    """Give a field another value; a function makes it of the present one."""

    def spoil(body: Json) -> None:
        holder, name = _find(body, path)
        holder[name] = value(holder[name]) if callable(value) else value

    return spoil


def with_added(name: str, *, value: Any) -> Callable[[Json], None]:
    """Put a field into the envelope that the contract does not have there."""

    def spoil(body: Json) -> None:
        assert name not in body
        body[name] = value

    return spoil


def _find(body: Json, path: tuple[str, ...]) -> tuple[Json, str]:
    *above, name = path
    for each in above:
        body = body[each]
    assert name in body, f"the contract's {'.'.join(path)} is not there to be spoiled"
    return body, name


class Double:
    """A server on loopback, in a thread; ``url`` of a mutation is where its spoiled API is.

    ``polls`` counts, by mutation, how often tasks were asked for there.
    """

    def __init__(self, folder: Path, mutations: list[Mutation]) -> None:
        settings = ServerSettings(data_dir=folder, model="fake", min_free_disk=0)
        self._database = open_database(settings.database)
        built = assemble(settings, self._database, open_pictures(settings))
        services = replace(built, dispatch=IdleDispatch())
        services.blobs.put(OUTPUT, a_picture())
        self.key = services.keys.create("client")
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in mutations]
        ports = [listener.getsockname()[1] for listener in self._sockets]
        by_port = dict(zip(ports, mutations, strict=True))
        self._urls = {each.name: f"http://127.0.0.1:{port}" for port, each in by_port.items()}
        self.polls: Counter[str] = Counter()
        app = Spoiling(build_app(services), by_port, services.store, self.polls)
        config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=(self._sockets,))

    def url(self, mutation: str) -> str:
        return self._urls[mutation]

    def __enter__(self) -> Self:
        self._thread.start()
        ends_at = time.monotonic() + 30
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < ends_at
            time.sleep(0.01)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._database.dispose()


class Spoiling:
    """Passes requests on, and changes the good answers about tasks."""

    def __init__(
        self,
        app: ASGIApp,
        by_port: Mapping[int, Mutation],
        store: TaskStore,
        polls: "Counter[str]",
    ) -> None:
        self._app = app
        self._by_port = by_port
        self._store = store
        self._polls = polls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or not scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return
        sent: list[Message] = []

        async def keep(message: Message) -> None:
            sent.append(message)

        await self._app(scope, receive, keep)
        start, body = sent[0], b"".join(each.get("body", b"") for each in sent[1:])
        mutation = self._by_port[scope["server"][1]]
        if start["status"] == 200:
            if scope["method"] == "POST":
                await asyncio.to_thread(end_next, self._store, DONE)
            else:
                self._polls[mutation.name] += 1
            start, body = self._spoiled(mutation, start, body)
        await send(start)
        await send({"type": "http.response.body", "body": body})

    def _spoiled(self, mutation: Mutation, start: Message, body: bytes) -> tuple[Message, bytes]:
        answer = json.loads(body)
        mutation.spoil(answer)
        body = json.dumps(answer).encode()
        headers = [each for each in start["headers"] if each[0] != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        return {**start, "status": mutation.status, "headers": headers}, body
