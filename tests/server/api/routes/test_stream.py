"""A task followed as server-sent events: what is said, when it ends, and what it may cost."""

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from e2e.live import LiveServer, a_picture, data_uri, wait_until
from redux_server.api.auth import KeyRing
from redux_server.api.following import Subscriptions
from redux_server.api.routes import stream
from redux_server.tasks.previews import StoredPreview
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Outcome, Status
from server.in_process import Api, submit

DONE = Outcome(Status.COMPLETED, ["x/1/0.png"], [False], [7])


@dataclass
class Event:
    name: str = ""
    id: str = ""
    data: Any = None
    comment: str = ""
    retry: str = ""


def parse(text: str) -> Iterator[Event]:
    """Events as the standard's grammar has them."""
    for block in text.split("\n\n")[:-1]:
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(":")
            fields[name or "comment"] = value.removeprefix(" ")
        data = json.loads(fields["data"]) if "data" in fields else None
        get = fields.get
        yield Event(get("event", ""), get("id", ""), data, get("comment", ""), get("retry", ""))


@dataclass
class Reader:
    """A client of one stream, in the event loop of the app."""

    api: Api
    task_id: str
    last_id: str = ""
    key: str = ""
    query: str = ""
    is_reading: bool = True
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    has_left: asyncio.Event = field(default_factory=asyncio.Event)
    running: "asyncio.Task[None] | None" = None

    async def __aenter__(self) -> "Reader":
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": f"/api/v3/predictions/{self.task_id}/stream",
            "raw_path": b"",
            "query_string": self.query.encode(),
            "headers": [
                (b"host", b"test"),
                (b"authorization", f"Bearer {self.key or self.api.key}".encode()),
                *([(b"last-event-id", self.last_id.encode())] if self.last_id else []),
            ],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        is_first = True

        async def receive() -> Any:
            nonlocal is_first
            if is_first:
                is_first = False
                return {"type": "http.request", "body": b"", "more_body": False}
            await self.has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            while not self.is_reading:
                await asyncio.sleep(3600)
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            self.body += message.get("body", b"")

        self.running = asyncio.create_task(self.api.app(scope, receive, send))  # type: ignore[arg-type]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.has_left.set()
        assert self.running
        await asyncio.wait_for(self.running, 5)

    @property
    def events(self) -> list[Event]:
        return [event for event in parse(self.body.decode()) if event.name]

    async def see(self, condition: Callable[[list[Event]], bool]) -> list[Event]:
        """The events once they meet ``condition``."""
        async with asyncio.timeout(10):
            while not condition(self.events):
                await asyncio.sleep(0.01)
        return self.events

    async def end(self) -> list[Event]:
        assert self.running
        await asyncio.wait_for(asyncio.shield(self.running), 10)
        return self.events


def run(api: Api, what: Callable[[], Awaitable[None]]) -> None:
    api._runner.run(what())  # type: ignore[arg-type]


def new_task(api: Api) -> str:
    body = {"image": "https://example.com/a.png", "num_inference_steps": 4}
    return str(submit(api, body)["id"])


def polled(api: Api, task_id: str) -> Any:
    return api.get(f"/api/v3/predictions/{task_id}/result").json()["data"]


def test_stream_tells_each_change_and_ends_with_the_task(api: Api) -> None:
    task_id = new_task(api)
    store = api.services.store
    seen: list[Event] = []

    async def follow() -> None:
        async with Reader(api, task_id) as reader:
            await reader.see(lambda events: len(events) == 1)
            (task,) = await asyncio.to_thread(store.claim, "w")
            await reader.see(lambda events: events[-1].data["status"] == "processing")
            await asyncio.to_thread(store.renew, "w", {task_id: (task.attempt, 2)})
            await reader.see(lambda events: events[-1].data["progress"]["step"] == 2)
            await asyncio.to_thread(store.finish, task_id, task.attempt, DONE)
            seen.extend(await reader.end())
            assert (reader.status, reader.headers["cache-control"]) == (200, "no-store")
            assert reader.headers["content-type"].startswith("text/event-stream")
            assert next(parse(reader.body.decode())).retry == "2000"

    run(api, follow)
    assert [event.name for event in seen] == ["progress"] * 3 + ["end"]
    assert len({event.id for event in seen}) == 4 and all(event.id for event in seen)
    assert seen[-1].data == polled(api, task_id)
    assert seen[-1].data["outputs"][0].startswith("http://test/files/")
    assert len(api.services.streams) == 0


def test_waiting_task_s_stream_tells_how_it_moves_up(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "POSITION_EVERY_S", 0.05)
    _first, second = new_task(api), new_task(api)

    async def follow() -> None:
        async with Reader(api, second) as reader:
            (event,) = await reader.see(lambda events: len(events) == 1)
            assert event.data["progress"]["queue_position"] == 1
            await asyncio.to_thread(api.services.store.claim, "w")
            events = await reader.see(lambda events: len(events) == 2)
            assert events[-1].data["progress"]["queue_position"] == 0

    run(api, follow)


def test_resumed_stream_leaves_out_what_was_seen_and_never_the_end(api: Api) -> None:
    task_id = new_task(api)

    async def follow() -> None:
        async with Reader(api, task_id) as reader:
            (first,) = await reader.see(lambda events: len(events) == 1)
        async with Reader(api, task_id, last_id=first.id) as again:
            await asyncio.sleep(0.4)
            assert again.events == []
            (task,) = await asyncio.to_thread(api.services.store.claim, "w")
            await again.see(lambda events: len(events) == 1)
        await asyncio.to_thread(api.services.store.finish, task_id, task.attempt, DONE)
        async with Reader(api, task_id, last_id=first.id) as late:
            (end,) = await late.end()
            assert end.name == "end"
        async with Reader(api, task_id, last_id=end.id) as too_late:
            await too_late.end()
            assert (too_late.status, too_late.body) == (204, b"")
        async with Reader(api, task_id, last_id="made up") as other:
            assert [event.name for event in await other.end()] == ["end"]

    run(api, follow)


def test_stream_of_a_deleted_task_says_so_and_ends(api: Api) -> None:
    task_id = new_task(api)

    async def follow() -> None:
        async with Reader(api, task_id) as reader:
            await reader.see(lambda events: len(events) == 1)
            await asyncio.to_thread(api.services.store.delete, [task_id])
            last = (await reader.end())[-1]
            assert (last.name, last.data["code"], last.id) == ("gone", 404, "")

    run(api, follow)


def test_only_the_owner_may_follow(api: Api) -> None:
    task_id = new_task(api)
    path = f"/api/v3/predictions/{task_id}/stream"
    other = api.services.keys.create("other")
    unknown = api.get(f"/api/v3/predictions/{'0' * 32}/stream").text.replace("0" * 32, task_id)
    assert api.get(path, key="").status_code == 401
    refused = api.get(path, key=other)
    assert (refused.status_code, refused.text) == (404, unknown)
    assert api.get("/api/v3/predictions/..%2f/stream").status_code == 404


def test_silence_is_filled_with_comments(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.05)
    task_id = new_task(api)
    api.services.store.claim("w")

    async def follow() -> None:
        async with Reader(api, task_id) as reader:
            async with asyncio.timeout(10):
                while sum(bool(e.comment) for e in parse(reader.body.decode())) < 3:
                    await asyncio.sleep(0.01)
            assert len(reader.events) == 1

    run(api, follow)


def test_stream_ends_after_a_while_so_that_its_key_is_looked_at_again(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "LONGEST_S", 0.2)
    monkeypatch.setattr(stream, "POSITION_EVERY_S", 0.05)
    task_id = new_task(api)

    async def follow() -> None:
        async with Reader(api, task_id) as reader:
            assert [event.name for event in await reader.end()] == ["progress"]

    run(api, follow)
    assert len(api.services.streams) == 0


# --- previews -------------------------------------------------------------------------------------

PREVIEW = StoredPreview(1, 2, 0, b"\xff\xd8 a picture")


def claimed(api: Api, **more: Any) -> Any:
    """A task that is worked on."""
    submit(api, {"image": "https://example.com/a.png", **more})
    (task,) = api.services.store.claim("w")
    return task


@pytest.mark.parametrize("asks", ["task", "reader"])
def test_previews_are_told_without_an_id_to_whom_asks_for_them(api: Api, asks: str) -> None:
    task = claimed(api, **({"enable_preview": True} if asks == "task" else {}))
    previews = api.services.previews

    async def follow() -> None:
        async with Reader(api, task.id, query="preview=1" if asks == "reader" else "") as reader:
            await reader.see(lambda events: len(events) == 1)
            is_known = previews.wanted([task.id]) == {task.id}
            assert is_known == (asks == "reader"), "its worker knows of the task's own wish"
            for step in (2, 3):
                await asyncio.to_thread(previews.put, task.id, replace(PREVIEW, step=step))
                events = await reader.see(lambda events, step=step: len(events) == step)
                assert (events[-1].name, events[-1].id) == ("preview", "")
                assert events[-1].data["step"] == step
            kind, _, data = events[-1].data["data"].partition(",")
            assert (kind, base64.b64decode(data)) == ("data:image/jpeg;base64", PREVIEW.jpeg)
            await asyncio.to_thread(api.services.store.finish, task.id, task.attempt, DONE)
            assert (await reader.end())[-1].name == "end"

    run(api, follow)


def test_previews_of_an_attempt_that_failed_and_for_who_does_not_ask_are_not_told(api: Api) -> None:
    task = claimed(api)

    async def follow() -> None:
        async with Reader(api, task.id) as plain, Reader(api, task.id, query="preview=1") as asking:
            await asking.see(lambda events: len(events) == 1)
            put = api.services.previews.put
            await asyncio.to_thread(put, task.id, replace(PREVIEW, attempt=0))
            await asyncio.to_thread(put, task.id, replace(PREVIEW, step=3))
            events = await asking.see(lambda events: len(events) == 2)
            assert events[-1].data["step"] == 3
            await asyncio.to_thread(api.services.store.finish, task.id, task.attempt, DONE)
            assert [event.name for event in await plain.end()] == ["progress", "end"]

    run(api, follow)


def test_where_every_image_is_checked_nobody_is_told_of_previews(build_api: Any) -> None:
    api = build_api(force_safety_checker=True)
    task = claimed(api, enable_preview=True)

    async def follow() -> None:
        async with Reader(api, task.id, query="preview=1") as reader:
            await reader.see(lambda events: len(events) == 1)
            assert api.services.previews.wanted([task.id]) == set()
            await asyncio.to_thread(api.services.previews.put, task.id, PREVIEW)
            await asyncio.to_thread(api.services.store.finish, task.id, task.attempt, DONE)
            assert [event.name for event in await reader.end()] == ["progress", "end"]

    run(api, follow)


# --- what streams may cost ------------------------------------------------------------------------


def opened(api: Api) -> float:
    return REGISTRY.get_sample_value("flux_redux_event_streams") or 0.0


def test_stream_of_a_revoked_key_ends_though_nothing_happens(api: Api) -> None:
    """By what the database says: whoever revokes a key is another process."""
    key = api.services.keys.create("other")
    task_id, mine = submit(api, key=key)["id"], submit(api)["id"]
    revoked = next(each.id for each in api.services.keys.list() if each.name == "other")

    async def follow() -> None:
        async with Reader(api, mine) as other, Reader(api, task_id, key=key) as reader:
            await reader.see(lambda events: bool(events))
            KeyRing(api.services.keys._database).revoke(revoked)
            assert reader.running and other.running
            await asyncio.wait_for(asyncio.shield(reader.running), 10)
            assert [event.name for event in reader.events] == ["progress"]
            await other.see(lambda events: bool(events))
            assert not other.running.done(), "the streams of others go on"

    api._runner.run(follow())
    assert len(api.services.streams) == 0


def test_client_that_leaves_frees_its_stream(api: Api) -> None:
    task_id = new_task(api)
    before = opened(api)

    async def follow() -> None:
        async with Reader(api, task_id) as reader:
            await reader.see(lambda events: len(events) == 1)
            assert (len(api.services.streams), opened(api)) == (1, before + 1)
        assert (len(api.services.streams), opened(api)) == (0, before)
        await asyncio.sleep(0.5)
        assert api.services.poller._polling is None, "nothing is looked for any more"

    run(api, follow)


def test_reader_that_does_not_read_is_dropped(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PATIENCE_S", 0.1)
    task_id = new_task(api)

    async def follow() -> None:
        async with Reader(api, task_id, is_reading=False) as reader:
            await reader.end()
            assert len(api.services.streams) == 0

    run(api, follow)


def test_too_many_streams_are_refused_until_one_ends(build_services: Any, build_api: Any) -> None:
    services = build_services()
    bounded = Subscriptions(services.poller, most=3, most_of_a_key=2)
    object.__setattr__(services, "streams", bounded)
    api: Api = build_api(services)
    task_id = new_task(api)
    path = f"/api/v3/predictions/{task_id}/stream"
    other = api.services.keys.create("other")
    body = {"image": "https://example.com/a.png"}
    theirs = api.post("/api/v3/wavespeed-ai/flux-pro-redux", json=body, key=other).json()["data"]

    async def refusal(**more: Any) -> Reader:
        async with Reader(api, **more) as reader:
            await reader.end()
        return reader

    async def follow() -> None:
        async with Reader(api, task_id) as one:
            async with Reader(api, task_id) as two:
                for reader in (one, two):
                    await reader.see(lambda events: len(events) == 1)
                refused = await refusal(task_id=task_id)
                assert (refused.status, refused.headers["retry-after"]) == (429, "5")
                async with Reader(api, theirs["id"], key=other) as three:
                    await three.see(lambda events: len(events) == 1)
                    assert (await refusal(task_id=theirs["id"], key=other)).status == 503
            async with Reader(api, task_id) as again:
                await again.see(lambda events: len(events) == 1)

    run(api, follow)
    services.poller.close()
    assert api.get(path).status_code == 503, "a server that stops opens no more"


def test_stream_lives_through_a_database_that_is_away(api: Api) -> None:
    from sqlalchemy.exc import OperationalError

    task_id = new_task(api)
    store: TaskStore = api.services.store

    def away(*_: Any) -> Any:
        raise OperationalError("", {}, Exception("away"))

    async def follow() -> None:
        poller = api.services.poller
        async with Reader(api, task_id) as reader:
            await reader.see(lambda events: len(events) == 1)
            present, poller._glance = poller._glance, away
            (task,) = await asyncio.to_thread(store.claim, "w")
            await asyncio.sleep(0.6)
            assert len(reader.events) == 1
            poller._glance = present
            await asyncio.to_thread(store.finish, task_id, task.attempt, DONE)
            assert (await reader.end())[-1].data["status"] == "completed"

    run(api, follow)


# --- over a socket --------------------------------------------------------------------------------


def test_live_stream_of_a_real_task(live: LiveServer) -> None:
    task = live.submit({"image": data_uri(a_picture()), "size": "512*512"})
    with live.client() as client:
        answer = client.get(f"/api/v3/predictions/{task['id']}/stream")
    events = [event for event in parse(answer.text) if event.name]
    assert events[-1].name == "end"
    assert events[-1].data == live.get(task["id"])
    steps = [event.data["progress"]["step"] for event in events]
    assert steps == sorted(steps)


@pytest.fixture
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of its own, with a task in it that takes its time."""
    data_dir = tmp_path_factory.mktemp("slow") / "data"
    flags = ("--fetch-allow", "127.0.0.1:*", "--drain-timeout-s", "1")
    with LiveServer(data_dir, *flags, model="fake-slow") as server:
        yield server


def test_stopping_server_ends_its_streams_at_once(slow: LiveServer) -> None:
    """A reader that listens, and one that never reads, on a task that is not done for a minute."""
    body = {"image": data_uri(a_picture()), "num_images": 4, "num_inference_steps": 50}
    ids = [slow.submit(body)["id"] for _ in range(3)]
    text: list[str] = []

    def listen() -> None:
        with slow.client() as client:
            text.append(client.get(f"/api/v3/predictions/{ids[-1]}/stream").text)

    thread = threading.Thread(target=listen)
    thread.start()
    with socket.create_connection(("127.0.0.1", slow.port)) as silent:
        head = f"GET /api/v3/predictions/{ids[-1]}/stream HTTP/1.1\r\nHost: x\r\n"
        silent.sendall(f"{head}Authorization: Bearer {slow.key}\r\n\r\n".encode())
        wait_until(lambda: "flux_redux_event_streams 2.0" in metrics(slow), 10)
        started = time.monotonic()
        slow.process.terminate()
        thread.join(20)
        ended_s = time.monotonic() - started
    assert text and "event: progress" in text[0] and "event: end" not in text[0]
    assert ended_s < 5, ended_s


def metrics(server: LiveServer) -> str:
    with server.client() as client:
        return client.get("/metrics").text
