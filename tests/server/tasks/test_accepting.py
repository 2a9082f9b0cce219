"""Accepting: idempotency keys, where they meet deletion, the bound and time; open tasks per key."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from e2e.live import a_picture, data_uri
from redux_server.database.tables import tasks
from redux_server.tasks.accepting import Bounds, IdempotencyKeys, free_places
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import (
    Created,
    FreePlaces,
    KeyConflict,
    KeyFull,
    NewTask,
    NoRoom,
    Outcome,
    Replayed,
    ShareFull,
    Status,
)
from server.in_process import SUBMIT, Api, Clock
from server.stored_tasks import count_rows

URL = {"image": "https://example.com/a.png", "size": "512*512"}
INLINE = {"image": data_uri(a_picture()), "size": "512*512"}
KEY = {"Idempotency-Key": "order 66"}


def files(folder: Path) -> list[Path]:
    """Those of tasks."""
    found = (folder / "data" / "blobs").rglob("*")
    return [path for path in found if path.is_file() and path.name != "database-id"]


@pytest.mark.parametrize("body", [URL, INLINE], ids=["url", "inline"])
def test_same_request_with_the_same_key_is_the_same_task(
    api: Api, database: Engine, tmp_path: Path, body: dict[str, Any]
) -> None:
    first = api.post(SUBMIT, json=body, headers=KEY)
    again = api.post(SUBMIT, json=body, headers=KEY)
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    assert first.json()["data"]["input"]["seed"] >= 0
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert count_rows(database) == 1
    assert len(files(tmp_path)) == (body is INLINE)


def test_replay_of_an_inline_picture_stores_it_at_no_time(api: Api, stored: list[str]) -> None:
    ids = {api.post(SUBMIT, json=INLINE, headers=KEY).json()["data"]["id"] for _ in range(3)}
    assert stored == [f"{task_id}/input" for task_id in ids]


def test_replay_shows_the_task_as_it_is_by_then(api: Api) -> None:
    task_id = api.post(SUBMIT, json=URL, headers=KEY).json()["data"]["id"]
    api.post(f"/api/v3/predictions/{task_id}/cancel")
    again = api.post(SUBMIT, json=URL, headers=KEY).json()["data"]
    assert (again["id"], again["status"]) == (task_id, "cancelled")


@pytest.mark.parametrize(
    "same",
    [
        {**URL, "seed": -1},
        {**URL, "seed": None, "prompt": ""},
        {**URL, "size": "512x512", "num_inference_steps": 28.0},
        {**URL, "unknown": 1},
    ],
)
def test_what_means_the_same_is_the_same_request(api: Api, same: dict[str, Any]) -> None:
    first = api.post(SUBMIT, json=URL, headers=KEY).json()["data"]["id"]
    assert api.post(SUBMIT, json=same, headers=KEY).json()["data"]["id"] == first


@pytest.mark.parametrize("other", [{"seed": 7}, {"prompt": "x"}, {"image": "https://a.example/b"}])
@pytest.mark.parametrize("body", [URL, INLINE], ids=["url", "inline"])
def test_other_request_with_the_same_key_is_refused(
    api: Api, database: Engine, tmp_path: Path, body: dict[str, Any], other: dict[str, Any]
) -> None:
    api.post(SUBMIT, json=body, headers=KEY)
    before = files(tmp_path)
    answer = api.post(SUBMIT, json={**body, **other}, headers=KEY)
    assert (answer.status_code, answer.json()["code"]) == (409, 409)
    assert answer.json()["error_code"] == "idempotency_conflict"
    assert "another request" in answer.json()["message"]
    assert count_rows(database) == 1
    assert files(tmp_path) == before


def test_other_model_is_another_request_and_the_other_version_is_not(api: Api) -> None:
    api.post(SUBMIT, json=URL, headers=KEY)
    other = api.post(SUBMIT.replace("flux-pro-redux", "flux-redux-dev"), json=URL, headers=KEY)
    assert other.status_code == 409
    assert api.post(SUBMIT.replace("v3", "v2"), json=URL, headers=KEY).status_code == 200


def test_keys_belong_to_the_api_key_that_sent_them(api: Api, database: Engine) -> None:
    stranger = api.services.keys.create("stranger")
    mine = api.post(SUBMIT, json=URL, headers=KEY)
    theirs = api.post(SUBMIT, json={**URL, "prompt": "x"}, headers=KEY, key=stranger)
    assert theirs.status_code == 200
    assert theirs.json()["data"]["id"] != mine.json()["data"]["id"]
    assert count_rows(database) == 2


def test_replays_are_answered_while_the_queue_is_full(build_api: Callable[..., Api]) -> None:
    api = build_api(max_queue=1)
    first = api.post(SUBMIT, json=URL, headers=KEY).json()
    assert api.post(SUBMIT, json=URL, headers={"Idempotency-Key": "new"}).status_code == 429
    assert api.post(SUBMIT, json=URL, headers=KEY).json() == first
    api.post(f"/api/v3/predictions/{first['data']['id']}/cancel")
    # A refused request has used nothing up.
    other = {**URL, "prompt": "another"}
    answer = api.post(SUBMIT, json=other, headers={"Idempotency-Key": "new"})
    assert answer.status_code == 200


def test_deleted_task_is_not_made_again_by_a_late_retry(api: Api, database: Engine) -> None:
    task_id = api.post(SUBMIT, json=URL, headers=KEY).json()["data"]["id"]
    assert api.request("DELETE", f"/api/v3/predictions/{task_id}").status_code == 200
    answer = api.post(SUBMIT, json=URL, headers=KEY)
    assert answer.status_code == 409
    assert "was deleted" in answer.json()["message"]
    assert count_rows(database) == 0


@pytest.mark.parametrize(
    ("names", "times"), [(12, 16), pytest.param(200, 64, marks=pytest.mark.slow)]
)
def test_parallel_requests_make_one_task_per_key(
    api: Api, database: Engine, tmp_path: Path, names: int, times: int
) -> None:
    async def flood() -> list[httpx.Response]:
        transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(
                *(
                    client.post(
                        SUBMIT,
                        json=INLINE if number % 4 == 0 else URL,
                        headers={
                            "Authorization": f"Bearer {api.key}",
                            "Idempotency-Key": f"key {number}",
                        },
                    )
                    for _ in range(times)
                    for number in range(names)
                )
            )

    answers = api._runner.run(flood())
    assert {answer.status_code for answer in answers} == {200}
    made = [answer for answer in answers if "idempotent-replayed" not in answer.headers]
    assert len(made) == names
    ids = [answer.json()["data"]["id"] for answer in answers]
    assert [len(set(ids[number::names])) for number in range(names)] == [1] * names
    assert count_rows(database) == len(set(ids)) == names
    assert len(files(tmp_path)) == names // 4, "a picture was left of a request that lost the race"


# --- several API processes ------------------------------------------------------------------------


def test_stores_side_by_side_make_one_task_per_key_and_keep_the_bound(
    either_database: Engine,
) -> None:
    stores = [TaskStore(either_database) for _ in range(4)]

    def send(number: int) -> list[Any]:
        new = [NewTask("k", "m", {}, idempotency_key=str(i), digest="d") for i in range(12)]
        return stores[number % 4].accept(new, max_open=8)

    with ThreadPoolExecutor(4) as pool:
        answers = [answer for some in pool.map(send, range(12)) for answer in some]
    kinds = [type(answer) for answer in answers]
    assert kinds.count(Created) == 8
    assert kinds.count(NoRoom) == 4 * 12
    assert kinds.count(Replayed) == 8 * 11
    assert count_rows(either_database) == 8


@pytest.mark.parametrize("is_one_batch", [True, False])
def test_idempotency_keys_of_different_api_keys_are_different(
    database: Engine, clock: Clock, is_one_batch: bool
) -> None:
    """Also where requests of several users are accepted with one commit."""
    store = TaskStore(database, clock=clock)

    def asked(key_id: str, digest: str) -> NewTask:
        return NewTask(
            key_id=key_id, model="m", input={}, idempotency_key="order 66", digest=digest
        )

    wanted = [asked("a", "1"), asked("b", "1"), asked("c", "2"), asked("a", "1"), asked("b", "2")]
    batches = [wanted] if is_one_batch else [[each] for each in wanted]
    answers = [answer for batch in batches for answer in store.accept(batch, max_open=100)]
    created = [answer.task for answer in answers[:3] if isinstance(answer, Created)]
    assert [task.key_id for task in created] == ["a", "b", "c"]
    assert isinstance(answers[3], Replayed) and answers[3].task.id == created[0].id
    assert isinstance(answers[4], KeyConflict)
    assert count_rows(database) == 3


# --- open tasks per key ---------------------------------------------------------------------------


@pytest.fixture
def store(database: Engine, clock: Clock) -> TaskStore:
    return TaskStore(database, clock=clock)


def new(key: str) -> NewTask:
    return NewTask(key_id=key, model="m", input={})


def test_one_batch_is_cut_where_its_key_is_full(store: TaskStore) -> None:
    batch = [new(key) for key in "abaabba"]
    answers = store.accept(batch, max_open=100, max_open_per_key=2)
    assert [isinstance(answer, KeyFull) for answer in answers] == [
        False, False, False, True, False, True, True,
    ]  # fmt: skip
    assert [answer.task.id for answer in answers if isinstance(answer, Created)] == [
        task.id for task, answer in zip(batch, answers, strict=True) if isinstance(answer, Created)
    ]


def test_running_tasks_count_and_ended_ones_do_not(store: TaskStore) -> None:
    store.accept([new("a"), new("a")], max_open=100, max_open_per_key=2)
    [task] = store.claim("w")
    assert store.accept([new("a")], max_open=100, max_open_per_key=2) == [KeyFull()]
    assert store.finish(task.id, task.attempt, Outcome(Status.COMPLETED))
    answers = store.accept([new("a"), new("a")], max_open=100, max_open_per_key=2)
    assert isinstance(answers[0], Created) and answers[1] == KeyFull()


def test_refused_task_takes_no_room_from_others(store: TaskStore) -> None:
    answers = store.accept([new("a"), new("a"), new("b"), new("c")], max_open=2, max_open_per_key=1)
    assert isinstance(answers[0], Created) and answers[1] == KeyFull()
    assert isinstance(answers[2], Created) and answers[3] == NoRoom()


def test_no_limit_is_no_limit(store: TaskStore) -> None:
    answers = store.accept([new("a") for _ in range(50)], max_open=50)
    assert all(isinstance(answer, Created) for answer in answers)


@pytest.mark.parametrize("seed", range(5))
def test_no_key_is_ever_over_its_limit_and_none_is_refused_below(
    store: TaskStore, database: Engine, seed: int
) -> None:
    rng = random.Random(seed)
    opened: Counter[str] = Counter()
    for _ in range(60):
        for task in store.claim("w") if rng.random() < 0.4 else ():
            assert store.finish(task.id, task.attempt, Outcome.failure(1, "x"))
            opened[task.key_id] -= 1
        left = free_places(database, list("cab"), bounds=Bounds(70, 3))
        assert left == [FreePlaces(70 - opened.total(), 3 - opened[key]) for key in "cab"]
        batch = [new(rng.choice("abc")) for _ in range(rng.randrange(5))]
        for given, answer in zip(
            batch, store.accept(batch, max_open=1000, max_open_per_key=3), strict=True
        ):
            assert isinstance(answer, Created) == (opened[given.key_id] < 3)
            opened[given.key_id] += isinstance(answer, Created)


def test_counting_reads_an_index_not_the_table(database: Engine) -> None:
    with database.connect() as db:
        plan = db.exec_driver_sql(
            "EXPLAIN QUERY PLAN SELECT key_id, count(*) FROM tasks "
            "WHERE finished_at IS NULL AND key_id IN ('a') GROUP BY key_id"
        ).all()
    assert any("INDEX tasks_open" in row[3] for row in plan), plan
    assert any("finished_at" in index.columns for index in tasks.indexes)


def test_request_that_was_left_is_rejoined_once_and_for_a_minute(
    api: Api, database: Engine
) -> None:
    clock = Clock()
    keys = IdempotencyKeys(database, clock=clock)
    task_id = api.post(SUBMIT, json=URL).json()["data"]["id"]
    assert keys.rejoin("k", "d") is None
    keys.leave("k", "d", task_id)
    assert keys.rejoin("other", "d") is None and keys.rejoin("k", "other") is None
    clock.now += 59
    found = keys.rejoin("k", "d")
    assert found is not None and found.id == task_id
    assert keys.rejoin("k", "d") is None, "one caller left, one came back"
    keys.leave("k", "d", task_id)
    keys.leave("k", "d", task_id)  # another one
    clock.now += 61
    assert keys.rejoin("k", "d") is None


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_task_that_is_no_more_is_not_rejoined(api: Api, database: Engine, end: str) -> None:
    keys = IdempotencyKeys(database)
    task_id = api.post(SUBMIT, json=URL).json()["data"]["id"]
    keys.leave("k", "d", task_id)
    if end == "cancel":
        api.post(f"/api/v3/predictions/{task_id}/cancel")
    else:
        api.post("/api/v3/predictions/delete", json={"ids": [task_id]})
    assert keys.rejoin("k", "d") is None


def test_no_key_of_a_client_is_that_of_a_request_that_was_left(api: Api, database: Engine) -> None:
    keys = IdempotencyKeys(database)
    keys.leave(api.services.keys.list()[0].id, "d", "t" * 32)
    for sent in ("d", "\x1fd", "%1Fd"):
        answer = api.post(SUBMIT, json=URL, headers={"Idempotency-Key": sent})
        assert answer.status_code in (200, 400), answer.text


# --- the share of a key ---------------------------------------------------------------------------


def fill(store: TaskStore, key: str, *, of: int = 20) -> int:
    """How many tasks of the key are accepted until one is not."""
    for count in range(of + 1):
        [answer] = store.accept([new(key)], max_open=of, share=80)
        if not isinstance(answer, Created):
            assert answer in (NoRoom(), ShareFull())
            return count
    raise AssertionError("more than there is room for")


def test_key_that_is_alone_may_fill_its_share_and_no_more(store: TaskStore) -> None:
    assert fill(store, "flood") == 16


def test_key_that_comes_late_finds_places_and_gets_as_many_as_the_first(
    store: TaskStore,
) -> None:
    opened = Counter({"flood": fill(store, "flood"), "late": fill(store, "late")})
    assert opened == {"flood": 16, "late": 4}
    for _ in range(24):  # tasks end, and both fill up again, the first one first
        [task] = store.claim("w")
        assert store.finish(task.id, task.attempt, Outcome(Status.COMPLETED))
        opened[task.key_id] -= 1
        for key in ("flood", "late"):
            opened[key] += fill(store, key)
    assert abs(opened["flood"] - opened["late"]) <= 4, opened
    assert 16 < opened.total() < 20, "there is room for the next key"
    assert fill(store, "third") >= 1


def test_small_queue_can_be_filled_by_one_key(store: TaskStore) -> None:
    assert fill(store, "only", of=4) == 4


def test_without_a_share_one_key_may_have_all(store: TaskStore) -> None:
    answers = store.accept([new("only") for _ in range(100)], max_open=100, share=100)
    assert all(isinstance(answer, Created) for answer in answers)


@pytest.mark.parametrize("share", [1, 50, 80, 99])
def test_what_is_foreseen_is_what_is_accepted(
    store: TaskStore, database: Engine, share: int
) -> None:
    for key in "aba":
        [free] = free_places(database, [key], bounds=Bounds(50, 0, share))
        batch = [new(key) for _ in range(60)]
        answers = store.accept(batch, max_open=50, share=share)
        taken = sum(isinstance(answer, Created) for answer in answers)
        assert taken == min(free.of_all, max(0, free.of_share))
        assert all(isinstance(answer, Created) for answer in answers[:taken])


def test_refusal_for_its_share_says_so(build_api: Callable[..., Api]) -> None:
    api = build_api(max_queue=10, queue_share=50)
    assert [api.post(SUBMIT, json=URL).status_code for _ in range(5)] == [200] * 5
    for body in (URL, INLINE):
        answer = api.post(SUBMIT, json=body)
        assert answer.status_code == 429
        assert answer.json()["error_code"] == "queue_full"
        assert "its share of the queue" in answer.json()["message"]
        assert answer.headers["retry-after"] == "5"
    other = api.services.keys.create("other")
    assert api.post(SUBMIT, json=URL, key=other).status_code == 200
