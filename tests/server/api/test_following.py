"""Tasks that are followed: what one look for all may cost, and requests held until the end."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import structlog
from sqlalchemy.exc import OperationalError

from redux_server.api.auth import KeyRing
from redux_server.api.coalescer import Coalescer
from redux_server.api.following import (
    EVERY_S,
    KEYS_EVERY_S,
    Subscription,
    Subscriptions,
    SyncMode,
    TaskPoller,
    TooManySubscriptions,
)
from redux_server.tasks.store import Glance, TaskStore
from redux_server.tasks.task import Outcome, Status, Task
from server.in_process import SUBMIT, Api, end_next

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
    monkeypatch.setattr(api.services.sync_mode._subscriptions, "_most", 0)
    started = time.monotonic()
    answer = api.post(SUBMIT, json=BODY)
    assert time.monotonic() - started < 10
    check_too_early(api, answer, "as many requests as it may")


def test_stopping_server_lets_go_of_those_it_holds_and_of_those_to_come(api: Api) -> None:
    threading.Timer(0.3, close, [api]).start()
    check_too_early(api, api.post(SUBMIT, json=BODY), "about to stop")
    check_too_early(api, api.post(SUBMIT, json=BODY), "about to stop")


def close(api: Api) -> None:
    api._runner.get_loop().call_soon_threadsafe(api.services.poller.close)


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
        self.deleted: set[str] = set()
        self.steps: dict[str, int] = {}
        self.looks: list[list[str]] = []
        self.reads: list[str] = []
        self.is_away = False
        self.is_broken = False

    def glance(self, ids: Any) -> dict[str, Glance]:
        self.looks.append(list(ids))
        self._check()
        return {
            task_id: Glance(self.get([task_id])[0].status, 1, self.steps.get(task_id, 0))  # type: ignore[union-attr]
            for task_id in ids
            if task_id not in self.deleted
        }

    def find(self, ids: Any) -> list[Task | None]:
        self.reads += ids
        self._check()
        return self.get(ids)

    def get(self, ids: Any) -> list[Task | None]:
        return [
            None if task_id in self.deleted else a_task(task_id, has_ended=task_id in self.ended)
            for task_id in ids
        ]

    def _check(self) -> None:
        if self.is_away:
            raise OperationalError("select", {}, Exception("away"))
        if self.is_broken:
            raise ValueError("a bug")


class Followers:
    """A poller with both kinds of those who follow."""

    def __init__(self, tasks: Tasks, find: Any, limit_s: float, every_s: float, most: int) -> None:
        self.poller = TaskPoller(tasks.glance, every_s=every_s)
        self.streams = Subscriptions(self.poller, most=1000, most_of_a_key=1000)
        self.held = Subscriptions(self.poller, most=1000, most_of_a_key=most)
        self.hold = SyncMode(self.held, find, limit_s=limit_s).hold


def run(
    scene: Callable[[Followers, Tasks], Any],
    *,
    limit_s: float = PATIENCE_S,
    every_s: float = 0.02,
    most: int = 1000,
) -> Any:
    """``scene`` over fresh followers; nobody is followed afterwards, and nobody looks."""

    async def whole() -> Any:
        tasks = Tasks()
        find = Coalescer(tasks.find, name="find")
        followers = Followers(tasks, find, limit_s, every_s, most)
        try:
            result = await scene(followers, tasks)
            assert (
                not followers.poller._followed
                and not followers.held._by_key
                and not len(followers.held)
            )
            await asyncio.sleep(0.2)
            assert followers.poller._polling is None, "nobody looks when nobody waits"
            return result
        finally:
            find.close()

    return asyncio.run(whole())


def test_one_look_serves_streams_and_held_requests_together() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        streams = [followers.streams.open(f"s{i % 40}", "k") for i in range(80)]
        held = [f"t{i}" for i in range(100)]
        waiting = [asyncio.create_task(followers.hold(a_task(each), never)) for each in held]
        assert all([await each.wait(5) for each in streams]), "the first look is news"
        await asyncio.sleep(0.5)
        assert not any([await each.wait(0.0001) for each in streams]), "nothing is new"
        assert len(tasks.looks) <= 30, "at most one look in each 0.02 s, for all of them"
        assert set(map(len, tasks.looks[1:])) == {140}
        assert tasks.reads == [], "whole tasks are read at their end"
        tasks.ended = set(held)
        answers = await asyncio.gather(*waiting)
        assert [each.task.id for each in answers if each.task] == held
        assert not any(each.too_early for each in answers)
        assert sorted(tasks.reads) == sorted(held)
        for each in streams:
            followers.streams.release(each)
            followers.streams.release(each)
        assert len(followers.streams) == 0

    run(scene)


def test_more_tasks_than_one_statement_should_name_are_looked_at_in_several() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        streams = [followers.streams.open(f"{i:04}", "k") for i in range(1000)]
        assert all([await each.wait(5) for each in streams])
        assert {len(ids) for ids in tasks.looks} == {500}
        for each in streams:
            followers.streams.release(each)

    run(scene)


def test_each_change_wakes_those_who_follow_that_task_alone() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        one, two, other = (followers.streams.open(task_id, "k") for task_id in "aab")
        for each in (one, two, other):
            assert await each.wait(5)
        tasks.steps["a"] = 1
        assert await one.wait(5) and await two.wait(5)
        assert not await other.wait(0.1)
        tasks.deleted = {"b"}
        assert await other.wait(5) and other.seen is None
        for each in (one, two, other):
            followers.streams.release(each)

    run(scene)


def test_subscription_that_is_to_look_again_is_woken_by_the_same_state() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        one = followers.streams.open("a", "k")
        assert await one.wait(5) and not await one.wait(0.1)
        one.look_again()
        assert await one.wait(5)
        followers.streams.release(one)

    run(scene)


def test_stopping_wakes_all_and_lets_nobody_in() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        one = followers.streams.open("a", "k")
        held = asyncio.create_task(followers.hold(a_task("b"), never))
        await one.wait(5)
        followers.poller.close()
        assert await one.wait(5)
        assert "about to stop" in (await held).too_early
        assert "about to stop" in (await followers.hold(a_task("c"), never)).too_early
        with pytest.raises(TooManySubscriptions):
            followers.streams.open("d", "k")
        followers.streams.release(one)

    run(scene)


def test_steps_of_a_held_task_are_not_its_end() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        waiting = asyncio.create_task(followers.hold(a_task("t"), never))
        for step in range(5):
            tasks.steps["t"] = step
            await asyncio.sleep(0.05)
        assert not waiting.done() and tasks.reads == []
        tasks.ended = {"t"}
        assert not (await waiting).too_early

    run(scene)


def test_each_key_holds_no_more_than_its_share() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        first = [asyncio.create_task(followers.hold(a_task(f"t{i}"), never)) for i in range(2)]
        await asyncio.sleep(0.05)
        assert "as many" in (await followers.hold(a_task("t3"), never)).too_early
        other = asyncio.create_task(followers.hold(a_task("t4", key_id="other"), never))
        await asyncio.sleep(0.05)
        tasks.ended = {"t0", "t1", "t4"}
        assert not any(each.too_early for each in await asyncio.gather(*first, other))

    run(scene, most=2)


def test_client_that_leaves_frees_its_place() -> None:
    async def leaves() -> None:
        await asyncio.sleep(0.05)

    async def scene(followers: Followers, tasks: Tasks) -> None:
        started = time.monotonic()
        assert (await followers.hold(a_task("t"), leaves)).too_early
        assert time.monotonic() - started < PATIENCE_S / 2

    run(scene)


def test_request_that_is_cancelled_frees_its_place() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        waiting = asyncio.create_task(followers.hold(a_task("t"), never))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scene)


@pytest.mark.parametrize("fault", ["is_away", "is_broken"])
def test_database_that_is_away_is_waited_for(fault: str) -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        setattr(tasks, fault, True)
        waiting = asyncio.create_task(followers.hold(a_task("t"), never))
        await asyncio.sleep(0.2)
        assert not waiting.done() and len(tasks.looks) > 1
        setattr(tasks, fault, False)
        tasks.ended = {"t"}
        assert not (await waiting).too_early

    run(scene)


def test_database_that_goes_away_between_the_look_and_the_reading_is_waited_for() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        tasks.ended = {"t"}
        fails = [True] * 3

        async def failing(task_id: str) -> Task | None:
            if fails and fails.pop():
                raise OperationalError("select", {}, Exception("away"))
            return tasks.get([task_id])[0]

        answer = await SyncMode(followers.held, failing, limit_s=PATIENCE_S).hold(
            a_task("t"), never
        )
        assert not answer.too_early and not fails

    run(scene)


def test_database_that_is_away_is_complained_of_once() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        with structlog.testing.capture_logs() as logs:
            tasks.is_away = True
            one = followers.streams.open("a", "k")
            await asyncio.sleep(0.2)
            tasks.is_away = False
            assert await one.wait(5)
            tasks.is_away = True
            await asyncio.sleep(0.2)
        assert [each["log_level"] for each in logs] == ["warning"] * 2
        followers.streams.release(one)

    run(scene)


def test_database_that_stays_away_is_told_as_too_early() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        tasks.is_away = True
        answer = await followers.hold(a_task("t"), never)
        assert answer.task is not None and answer.task.id == "t"
        assert "within 0.1 s" in answer.too_early

    run(scene, limit_s=0.1)


def test_end_in_the_last_moment_is_told() -> None:
    """The limit comes before the next look; the task is read once more then."""

    async def scene(followers: Followers, tasks: Tasks) -> None:
        waiting = asyncio.create_task(followers.hold(a_task("t"), never))
        while not tasks.looks:
            await asyncio.sleep(0.001)
        tasks.ended = {"t"}
        assert not (await waiting).too_early
        assert (len(tasks.looks), tasks.reads) == (1, ["t"])

    run(scene, limit_s=0.05, every_s=0.1)


def test_two_may_wait_for_one_task() -> None:
    async def scene(followers: Followers, tasks: Tasks) -> None:
        both = [asyncio.create_task(followers.hold(a_task("t"), never)) for _ in range(2)]
        await asyncio.sleep(0.05)
        tasks.ended = {"t"}
        assert not any(each.too_early for each in await asyncio.gather(*both))

    run(scene)


def test_held_request_of_a_revoked_key_is_refused_and_its_task_goes_on(api: Api) -> None:
    key = api.services.keys.create("other")
    revoked = next(each.id for each in api.services.keys.list() if each.name == "other")

    def revoke() -> None:
        until = time.monotonic() + PATIENCE_S
        while api.services.store.queue_state().waiting == 0 and time.monotonic() < until:
            time.sleep(0.01)
        KeyRing(api.services.keys._database).revoke(revoked)  # as another process does

    thread = threading.Thread(target=revoke)
    thread.start()
    answer = api.post(SUBMIT, json=BODY, key=key)
    thread.join()
    assert answer.status_code == 401 and "revoked while the request was held" in answer.text
    assert answer.headers["www-authenticate"] == "Bearer"
    assert api.services.store.queue_state().waiting == 1


def test_keys_are_looked_at_often_enough_to_end_within_two_seconds() -> None:
    assert KEYS_EVERY_S + 2 * EVERY_S < 2


def test_a_database_that_is_away_revokes_nothing() -> None:
    async def follow() -> None:
        def away(_: Any) -> Any:
            raise OperationalError("", {}, Exception("away"))

        poller = TaskPoller(lambda ids: {}, revoked_of=away, every_s=0.001)
        subscription = Subscription("task", "key")
        poller.add(subscription)
        await subscription.wait()
        assert not subscription.is_revoked
        poller.close()

    asyncio.run(follow())
