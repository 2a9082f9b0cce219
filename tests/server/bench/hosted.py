"""The hosted service, imitated: its task API, its limits, its delays and its ways to fail.

It is a transport, for runs in virtual time, and answers over HTTP on loopback with ``serving``.
"""

import asyncio
import base64
import io
import json
import random
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from PIL import Image, ImageChops

from redux_server.bench.transport import Answer, NoAnswer, NotSent
from redux_server.parameters import parse_size

KEY = "wsk_0123456789abcdef"
URL = "http://hosted.test"
_DOCUMENT = {
    "paths": {
        "/api/v3/a/b": {"post": {"parameters": [{"in": "header", "name": "Idempotency-Key"}]}}
    }
}


@dataclass
class Task:
    """One task: who asked for what, and when it is done by the loop's clock."""

    id: str
    body: dict[str, Any]
    ready_at: float
    key: str = ""


@dataclass
class Hosted:
    """``service_s`` gives each task's seconds of work; ``workers`` tasks are worked on at once.

    ``per_minute`` images are accepted a minute (10 at the hosted service's lowest level), others
    get a 429 that says when to come again.
    """

    service_s: Callable[[random.Random], float] = lambda _: 1.0
    workers: int = 10**6
    per_minute: int = 10**6
    retry_after_s: float = 7.0
    render: Callable[[dict[str, Any]], bytes] = lambda _: b""
    stall: tuple[float, float] = (-1.0, -1.0)
    round_trip_s: float = 0.001
    has_idempotency: bool = False
    sync_gateway_s: float = 1e9
    refuse_key: bool = False
    seed: int = 0
    # what goes wrong: by the number of the submit, from 0
    fail: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tasks: dict[str, Task] = {}
        self.submits: list[float] = []
        self.refused = 0
        self.polls = 0
        self.most_open = 0
        self.seen_keys: set[str] = set()
        self._attempts = 0
        self._free_at: list[float] = []
        self._random = random.Random(self.seed)

    # --- as a transport ---------------------------------------------------------------------------

    async def close(self) -> None:
        pass

    async def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> Answer:
        parts = urlsplit(url)
        base = f"{parts.scheme}://{parts.netloc}"
        path = parts.path.removeprefix("/api/").removeprefix("/")
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(self.round_trip_s)
                return await self.answer(method, base, path, headers, body)
        except TimeoutError:
            raise NoAnswer("no answer in time") from None

    async def events(
        self, url: str, headers: Mapping[str, str], timeout_s: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        task = self.tasks[url.split("/")[-2]]
        base = url.partition("/api/")[0]
        yield self.told(task, base)
        await asyncio.sleep(task.ready_at - asyncio.get_running_loop().time())
        yield self.told(task, base)

    # --- the service ------------------------------------------------------------------------------

    async def answer(
        self, method: str, base: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        await self._stand_still()
        loop = asyncio.get_running_loop()
        if path.startswith("files/"):
            assert "Authorization" not in headers, "our key is sent to whoever holds the files"
            return Answer(200, {}, self.render(self.tasks[path.split("/")[1]].body))
        self.seen_keys.add(headers.get("Authorization", ""))
        if path == "v3/balance":
            return _told(401, "bad key") if self.refuse_key else _told(200, {"balance": 1})
        if path == "openapi.json" and self.has_idempotency:
            return Answer(200, {}, json.dumps(_DOCUMENT).encode())
        if method == "GET" and path.startswith("v3/predictions/"):
            self.polls += 1
            return _told(200, self.told(self.tasks[path.split("/")[2]], base))
        if method == "POST":
            return await self._submit(base, headers, json.loads(body), loop.time())
        return _told(404, "nothing here")

    def told(self, task: Task, base: str) -> dict[str, Any]:
        is_done = asyncio.get_running_loop().time() >= task.ready_at
        number = int(task.id.rpartition("-")[2])
        status = "completed" if is_done else "processing"
        if is_done and self.fail.get(number) == "task":
            status = "failed"
        return {
            "id": task.id,
            "status": status,
            "outputs": [f"{base}/files/{task.id}/0.png"] if status == "completed" else [],
            "urls": {"get": f"{base}/api/v3/predictions/{task.id}/result"},
            "has_nsfw_contents": [False] if status == "completed" else [],
            "error": f"out of luck, {KEY}" if status == "failed" else "",
            "timings": {"inference": 250 if is_done else 0},
        }

    async def _submit(
        self, base: str, headers: Mapping[str, str], body: dict[str, Any], now: float
    ) -> Answer:
        repeat_key = headers.get("Idempotency-Key", "")
        known = next(
            (each for each in self.tasks.values() if repeat_key and each.key == repeat_key), None
        )
        if known is not None:
            return _told(200, self.told(known, base))
        if sum(now - at < 60 for at in self.submits) >= self.per_minute:
            self.refused += 1
            return _told(429, "Too Many Requests", {"retry-after": f"{self.retry_after_s:g}"})
        number = self._attempts
        self._attempts += 1
        problem = self.fail.get(number, "")
        if problem == "refused":
            raise NotSent("connection refused")
        if problem.isdigit():
            return _told(int(problem), f"broken, {KEY}")
        self.submits.append(now)
        task = Task(f"task-{number}", body, self._ready_at(now), repeat_key)
        self.tasks[task.id] = task
        self.most_open = max(
            self.most_open, sum(each.ready_at > now for each in self.tasks.values())
        )
        if problem == "lost":
            raise NoAnswer("the connection was cut")
        if body.get("enable_sync_mode"):
            await asyncio.sleep(min(task.ready_at - now, self.sync_gateway_s))
            if task.ready_at - now > self.sync_gateway_s:
                return _told(504, "Gateway Timeout")
        return _told(200, self.told(task, base))

    def _ready_at(self, now: float) -> float:
        """First come, first served."""
        work_s = self.service_s(self._random)
        start = now
        if len(self._free_at) >= self.workers:
            self._free_at.sort()
            start = max(now, self._free_at.pop(0))
        ready_at = start + work_s
        if start < self.stall[1] and ready_at > self.stall[0]:  # it was stopped meanwhile
            ready_at += self.stall[1] - max(start, self.stall[0])
        if self.workers < 10**6:
            self._free_at.append(ready_at)
        return ready_at

    async def _stand_still(self) -> None:
        now = asyncio.get_running_loop().time()
        if self.stall[0] <= now < self.stall[1]:
            await asyncio.sleep(self.stall[1] - now)


def _told(status: int, data: Any, headers: Mapping[str, str] | None = None) -> Answer:
    message = "success" if status == 200 else data
    body = {"code": status, "message": message, "data": data if status == 200 else None}
    return Answer(status, dict(headers or {}), json.dumps(body).encode())


# --- what it paints -------------------------------------------------------------------------------


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def variation(body: Mapping[str, Any]) -> bytes:
    """The picture that was sent, in the size asked for, shifted and tinted by the seed."""
    picture = Image.open(io.BytesIO(base64.b64decode(body["image"].partition(",")[2])))
    image = picture.convert("RGB").resize(parse_size(body["size"]))
    seed = random.Random(body["seed"])
    image = ImageChops.offset(image, seed.randrange(-24, 25), seed.randrange(-24, 25))
    tint = Image.new("RGB", image.size, tuple(seed.randrange(256) for _ in range(3)))
    return png(Image.blend(image, tint, 0.1))


# --- over HTTP ------------------------------------------------------------------------------------


@contextmanager
def serving(hosted: Hosted) -> Iterator[str]:
    """Its URL on loopback, while a thread of its own answers there."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    where: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        base = f"http://{request.host}"
        path = request.path.removeprefix("/api/").removeprefix("/")
        try:
            answer = await hosted.answer(
                request.method, base, path, request.headers, await request.read()
            )
        except (NotSent, NoAnswer):
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return web.Response(status=answer.status, headers=answer.headers, body=answer.body)

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for data in hosted.events(str(request.url), request.headers, 60):
            await response.write(f"event: progress\ndata: {json.dumps(data)}\n\n".encode())
        return response

    async def start() -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/api/v3/predictions/{id}/stream", stream)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        where.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    def run() -> None:
        asyncio.set_event_loop(loop)
        task = loop.create_task(start())
        tasks.append(task)
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        finally:
            loop.close()

    tasks: list[asyncio.Task[None]] = []
    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    try:
        yield where[0]
    finally:
        loop.call_soon_threadsafe(tasks[0].cancel)
        thread.join()
