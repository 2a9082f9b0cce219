"""Idempotency keys: over HTTP, in parallel, and where they meet deletion, the bound and time."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, func, select

from e2e.live import a_picture, data_uri
from redux_server.api import housekeeping
from redux_server.api.services import Services
from redux_server.database.tables import idempotency, tasks
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Created, NewTask, NoRoom, Replayed
from server.in_process import Api

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
URL = {"image": "https://example.com/a.png", "size": "512*512"}
INLINE = {"image": data_uri(a_picture()), "size": "512*512"}
KEY = {"Idempotency-Key": "order 66"}


def count(database: Engine, table: Any = tasks) -> int:
    with database.connect() as db:
        return int(db.scalar(select(func.count()).select_from(table)) or 0)


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / "data" / "blobs").rglob("*") if path.is_file()]


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
    assert count(database) == 1
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
    assert count(database) == 1
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
    assert count(database) == 2


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", "é".encode("latin-1")])
def test_unusable_key_is_refused(api: Api, database: Engine, key: Any) -> None:
    answer = api.post(SUBMIT, json=URL, headers={"Idempotency-Key": key})
    assert answer.status_code == 400
    assert "Idempotency-Key must be 1 to 255 printable ASCII" in answer.json()["message"]
    assert count(database) == 0


def test_longest_key_is_taken(api: Api) -> None:
    headers = {"Idempotency-Key": "x" * 255}
    answers = [api.post(SUBMIT, json=URL, headers=headers) for _ in range(2)]
    assert answers[0].json() == answers[1].json()


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
    assert count(database) == 0


def test_keys_are_kept_for_a_day(build_services: Callable[..., Services], database: Engine) -> None:
    services = build_services()
    hour = 3600.0
    for name, age_h in (("old", 24.1), ("young", 23.9)):
        store = TaskStore(database, clock=lambda age_h=age_h: time.time() - age_h * hour)
        store.accept([NewTask("k", "m", {}, idempotency_key=name)], max_open=9)
    assert housekeeping.sweep_idempotency_keys(services) == 1
    with database.connect() as db:
        assert list(db.scalars(select(idempotency.c.key))) == ["young"]


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
    assert count(database) == len(set(ids)) == names
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
    assert count(either_database) == 8
