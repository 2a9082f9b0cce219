"""The list of a key's tasks: whose, in which order, which page, and what it costs."""

import json
from itertools import chain
from typing import Any

import pytest
from sqlalchemy import Engine, text

from redux_server.api.prediction import timestamp
from redux_server.api.services import Services
from redux_server.parameters import MODELS
from redux_server.tasks.task import Outcome, Status
from server.in_process import SUBMIT, URL, Api, end_next
from server.stored_tasks import NOON, fill


def ask(api: Api, *, key: str | None = None, **body: Any) -> Any:
    return api.post("/api/v3/predictions", json={"page": 1, "page_size": 100, **body}, key=key)


def listed(api: Api, **body: Any) -> list[str]:
    answer = ask(api, **body)
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["data"]["items"]]


def test_tasks_of_this_key_are_listed_newest_first_as_polls_show_them(api: Api) -> None:
    ids = [api.post(SUBMIT, json=URL).json()["data"]["id"] for _ in range(3)]
    other = api.services.keys.create("other")
    theirs = api.post(SUBMIT, json=URL, key=other).json()["data"]["id"]
    end_next(api.services.store, Outcome(Status.COMPLETED, ["x/1/0.png"], [False], [7]))
    items = ask(api).json()["data"]["items"]
    assert [item["id"] for item in items] == ids[::-1]
    for item in items:
        polled = api.get(f"/api/v3/predictions/{item['id']}/result").json()["data"]
        for name in ("queue_position", "waiting_for"):
            polled["progress"].pop(name, None)
        assert item == polled
    assert sum(item["status"] == "completed" and bool(item["outputs"]) for item in items) == 1
    assert listed(api, key=other) == [theirs]


def test_pages_hold_every_task_once_though_times_are_equal(
    api: Api, database: Engine, key_id: str
) -> None:
    ids = fill(database, 25, key_id=key_id, at=lambda i: NOON + i // 10)
    pages = [listed(api, page=number, page_size=7) for number in range(1, 6)]
    assert [len(page) for page in pages] == [7, 7, 7, 4, 0]
    assert sorted(chain.from_iterable(pages)) == sorted(ids)
    assert pages == [listed(api, page=number, page_size=7) for number in range(1, 6)]


def test_pages_before_a_time_do_not_shift_when_tasks_come(
    api: Api, database: Engine, key_id: str
) -> None:
    fill(database, 6, key_id=key_id)
    now = timestamp(NOON + 10)
    first = listed(api, page_size=3, created_before=now)
    fill(database, 2, key_id=key_id, at=lambda i: NOON + 20 + i)
    second = listed(api, page=2, page_size=3, created_before=now)
    assert len({*first, *second}) == 6


def test_filters(api: Api, database: Engine, key_id: str) -> None:
    done = fill(database, 2, key_id=key_id, status=Status.COMPLETED, queued_at=None)
    waiting = fill(database, 2, key_id=key_id, at=lambda i: NOON + 10 + i, model=MODELS[2])
    assert listed(api, status="completed") == done[::-1]
    assert listed(api, status="created") == waiting[::-1]
    assert listed(api, status="failed") == listed(api, status="timeout") == []
    assert listed(api, model=MODELS[2]) == waiting[::-1]
    assert listed(api, model="wavespeed-ai/nothing\x00") == []
    assert listed(api, model=MODELS[2], status="completed") == []
    assert listed(api, model=None, status="", created_after=None) == (done + waiting)[::-1]
    assert listed(api, created_after=timestamp(NOON + 1)) == [*waiting[::-1], done[1]]
    assert listed(api, created_before=timestamp(NOON + 1)) == [done[0]]
    assert listed(api, created_after="2027-01-15T09:00:10+01:00") == waiting[::-1]
    assert listed(api, created_after="2027-01-15T08:00:10.000000001Z") == waiting[::-1]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"page_size": 10}, "page is required: an integer from 1"),
        ({"page": 1}, "page_size is required"),
        ({"page": 0, "page_size": 10}, "page must be an integer from 1 to"),
        ({"page": 1, "page_size": 101}, "page_size must be an integer from 1 to 100; got 101."),
        ({"page": "1", "page_size": 10}, 'got "1"'),
        ({"page": 1, "page_size": 1, "status": "pending"}, "one of created, processing,"),
        ({"page": 1, "page_size": 1, "created_after": "yesterday"}, "a time such as"),
        ({"page": 1, "page_size": 1, "created_before": 5}, "a time such as"),
        ([], "must be a JSON object"),
    ],
)
def test_what_cannot_be_used_is_explained(api: Api, body: Any, says: str) -> None:
    answer = api.post("/api/v3/predictions", content=json.dumps(body))
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["message"]
    assert api.post("/api/v3/predictions", content=b"{").status_code == 400


def test_whole_floats_and_unknown_fields_pass(api: Api) -> None:
    assert ask(api, page=1.0, page_size=20.0, include_inputs=True).status_code == 200
    assert ask(api, page=10**9).json()["data"] == {"page": 10**9, "items": []}


def test_table_that_is_missing_is_a_503(build_services: Any, build_api: Any) -> None:
    services: Services = build_services()
    api: Api = build_api(services)
    assert ask(api).status_code == 200
    with services.store._database.begin() as db:
        db.execute(text("ALTER TABLE tasks RENAME TO hidden"))
    answer = ask(api)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")
