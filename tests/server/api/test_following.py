"""Requests that are held until their task has ended, and all that may come between."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from redux_server.api import following
from redux_server.api.coalescer import Coalescer
from redux_server.api.following import SyncMode
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Outcome, Status, Task
from server.in_process import Api, end_next

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
BODY = {"image": "https://example.com/a.png", "enable_sync_mode": True}
DONE = Outcome(Status.COMPLETED, [], [], [])
PATIENCE_S = 20.0


@contextmanager
def ending(store: TaskStore, outcome: Outcome = DONE) -> Iterator[None]:
    """Beside the test, wait for a task and end it so; it is certain to be held by then."""

    def work() -> None:
        until = time.monotonic() + PATIENCE_S
        while store.queue_state().waiting == 0 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        end_next(store, outcome)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE_S)


def test_answer_is_the_ended_task_whole(api: Api) -> None:
    with ending(api.services.store):
        answer = api.post(SUBMIT, json=BODY)
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert (data["status"], data["error"], data["code"]) == ("completed", "", 0)
    assert "enable_sync_mode" not in data["input"]
    assert data == api.get(f"/api/v3/predictions/{data['id']}").json()["data"]
    assert api.services.dispatch.wakes == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
def test_task_that_fails_is_a_200_with_its_reason(api: Api, status: Status) -> None:
    with ending(api.services.store, Outcome(status=status, code=1402, error="no such host")):
        answer = api.post(SUBMIT, json=BODY)
    data = answer.json()["data"]
    assert (answer.status_code, data["status"], data["error"]) == (
        200,
        status.value,
        "no such host",
    )
    assert data["code"] == 1402


def check_too_early(api: Api, answer: httpx.Response, reason: str) -> str:
    """The shape that clients know, and a task that goes on; returns its id."""
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert (data["status"], data["code"], data["outputs"]) == ("processing", 5004, [])
    assert data["error"].startswith("Sync mode timed out") and reason in data["error"]
    # One client sends a request again that met one of these.
    assert not [word for word in ("timeout", "connection", "http 5", "429")
                if word in data["error"].lower()]  # fmt: skip
    assert data["urls"]["get"] == f"http://test/api/v3/predictions/{data['id']}/result"
    polled = api.get(f"/api/v3/predictions/{data['id']}").json()["data"]
    assert (polled["status"], polled["error"], polled["code"]) == ("created", "", 0)
    task = end_next(api.services.store, DONE)
    assert task is not None and task.id == data["id"]
    task_id: str = data["id"]
    return task_id


def test_wait_ends_at_the_limit_and_the_task_goes_on(build_api: Callable[..., Api]) -> None:
    api = build_api(sync_timeout_s=0.3)
    started = time.monotonic()
    answer = api.post(SUBMIT, json=BODY)
    assert time.monotonic() - started >= 0.3
    check_too_early(api, answer, "within 0.3 s")


def test_without_the_flag_nothing_is_held(api: Api) -> None:
    for given in (False, None):
        answer = api.post(SUBMIT, json={**BODY, "enable_sync_mode": given})
        assert answer.json()["data"]["status"] == "created"


def test_replay_is_held_too_and_an_ended_one_answered_at_once(api: Api) -> None:
    headers = {"Idempotency-Key": "one"}
    plain = {**BODY, "enable_sync_mode": False}
    first = api.post(SUBMIT, json=plain, headers=headers).json()["data"]
    with ending(api.services.store):
        held = api.post(SUBMIT, json=BODY, headers=headers)
    again = api.post(SUBMIT, json=BODY, headers=headers)
    for answer in (held, again):
        assert answer.headers["idempotent-replayed"] == "true"
        data = answer.json()["data"]
        assert (data["id"], data["status"]) == (first["id"], "completed")


def test_task_deleted_meanwhile_is_a_404(api: Api) -> None:
    store = api.services.store

    def delete() -> None:
        until = time.monotonic() + PATIENCE_S
        while not (claimed := store.claim("host/cpu")) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        store.delete([claimed[0].id])

    thread = threading.Thread(target=delete)
    thread.start()
    answer = api.post(SUBMIT, json=BODY)
    thread.join(PATIENCE_S)
    assert (answer.status_code, answer.json()["error_code"]) == (404, "not_found")


def test_base64_comes_in_the_held_answer(api: Api) -> None:
    api.services.blobs.put("k/1/0.png", b"image")
    with ending(api.services.store, Outcome(Status.COMPLETED, ["k/1/0.png"], [False], [1])):
        answer = api.post(SUBMIT, json={**BODY, "enable_base64_output": True})
    assert answer.json()["data"]["outputs"] == ["aW1hZ2U="]


def test_over_the_bound_the_answer_comes_at_once_and_the_task_is_kept(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "MAX_HELD", 0)
    started = time.monotonic()
    answer = api.post(SUBMIT, json=BODY)
    assert time.monotonic() - started < 10
    check_too_early(api, answer, "as many requests as it may")


def test_stopping_server_lets_go_of_those_it_holds_and_of_those_to_come(api: Api) -> None:
    threading.Timer(0.3, close, [api]).start()
    check_too_early(api, api.post(SUBMIT, json=BODY), "about to stop")
    check_too_early(api, api.post(SUBMIT, json=BODY), "about to stop")


def close(api: Api) -> None:
    api._runner.get_loop().call_soon_threadsafe(api.services.sync_mode.close)


# --- many at a time -------------------------------------------------------------------------------


def a_task(task_id: str, *, has_ended: bool = False, key_id: str = "key") -> Task:
    status = Status.COMPLETED if has_ended else Status.PROCESSING
    times = {"created_at": 0.0, "started_at": 0.0, "finished_at": 1.0 if has_ended else None}
    counts = {"attempt": 1, "crashes": 0, "progress_step": 0}
    return Task(task_id, key_id, "m", status, {}, "", **times, **counts, outcome=None)  # type: ignore[arg-type]


async def never() -> None:
    await asyncio.Event().wait()


class Tasks:
    """A store's answers, and how often it was asked."""

    def __init__(self) -> None:
        self.ended: set[str] = set()
        self.looks: list[list[str]] = []
        self.is_away = False

    def get(self, ids: Any) -> list[Task | None]:
        self.looks.append(list(ids))
        if self.is_away:
            raise OperationalError("select", {}, Exception("away"))
        return [a_task(task_id, has_ended=task_id in self.ended) for task_id in ids]


def run(scene: Callable[[SyncMode, Tasks], Any], **more: Any) -> Any:
    """``scene`` over a fresh ``SyncMode``; nothing is left waiting afterwards."""

    async def whole() -> Any:
        tasks = Tasks()
        find = Coalescer(tasks.get, name="find")
        held = SyncMode(find, **{"limit_s": PATIENCE_S, "poll_s": 0.02, **more})
        try:
            result = await scene(held, tasks)
            assert not held._waiting and not held._held
            await asyncio.sleep(0.2)
            assert held._poller is None, "nobody looks when nobody waits"
            return result
        finally:
            find.close()

    return asyncio.run(whole())


def test_many_that_are_held_cost_one_look_at_a_time() -> None:
    async def scene(held: SyncMode, tasks: Tasks) -> None:
        ids = [f"t{number}" for number in range(100)]
        waiting = [asyncio.create_task(held.hold(a_task(each), never)) for each in ids]
        await asyncio.sleep(0.5)
        before = len(tasks.looks)
        assert 2 <= before <= 25, "at most one look in each 0.02 s, for all of them"
        assert max(map(len, tasks.looks)) == 100
        tasks.ended = set(ids)
        answers = await asyncio.gather(*waiting)
        assert [each.task.id for each in answers if each.task] == ids
        assert not any(each.too_early for each in answers)

    run(scene)


def test_each_key_holds_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "MAX_HELD_PER_KEY", 2)

    async def scene(held: SyncMode, tasks: Tasks) -> None:
        first = [asyncio.create_task(held.hold(a_task(f"t{i}"), never)) for i in range(2)]
        await asyncio.sleep(0.05)
        assert "as many" in (await held.hold(a_task("t3"), never)).too_early
        other = asyncio.create_task(held.hold(a_task("t4", key_id="other"), never))
        await asyncio.sleep(0.05)
        tasks.ended = {"t0", "t1", "t4"}
        assert not any(each.too_early for each in await asyncio.gather(*first, other))

    run(scene)


def test_client_that_leaves_frees_its_place() -> None:
    async def leaves() -> None:
        await asyncio.sleep(0.05)

    async def scene(held: SyncMode, tasks: Tasks) -> None:
        started = time.monotonic()
        assert (await held.hold(a_task("t"), leaves)).too_early
        assert time.monotonic() - started < PATIENCE_S / 2

    run(scene)


def test_request_that_is_cancelled_frees_its_place() -> None:
    async def scene(held: SyncMode, tasks: Tasks) -> None:
        waiting = asyncio.create_task(held.hold(a_task("t"), never))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scene)


def test_database_that_is_away_is_waited_for() -> None:
    async def scene(held: SyncMode, tasks: Tasks) -> None:
        tasks.is_away = True
        waiting = asyncio.create_task(held.hold(a_task("t"), never))
        await asyncio.sleep(0.2)
        assert not waiting.done() and len(tasks.looks) > 1
        tasks.is_away, tasks.ended = False, {"t"}
        assert not (await waiting).too_early

    run(scene)


def test_database_that_stays_away_is_told_as_too_early() -> None:
    async def scene(held: SyncMode, tasks: Tasks) -> None:
        tasks.is_away = True
        answer = await held.hold(a_task("t"), never)
        assert answer.task is not None and answer.task.id == "t"
        assert "within 0.1 s" in answer.too_early

    run(scene, limit_s=0.1)


def test_end_in_the_last_moment_is_told() -> None:
    """The limit comes before the next look, which is made then."""

    async def scene(held: SyncMode, tasks: Tasks) -> None:
        tasks.ended = {"t"}
        assert not (await held.hold(a_task("t"), never)).too_early
        assert len(tasks.looks) == 1

    run(scene, limit_s=0.05, poll_s=0.1)


def test_two_may_wait_for_one_task() -> None:
    async def scene(held: SyncMode, tasks: Tasks) -> None:
        both = [asyncio.create_task(held.hold(a_task("t"), never)) for _ in range(2)]
        await asyncio.sleep(0.05)
        tasks.ended = {"t"}
        assert not any(each.too_early for each in await asyncio.gather(*both))

    run(scene)
