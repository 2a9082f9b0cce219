"""The list of a key's tasks: whose, in which order, which page, and what it costs."""

import json
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest
from sqlalchemy import Engine, insert, text

from redux_server.api.prediction import timestamp
from redux_server.api.services import Services
from redux_server.database.connection import is_sqlite
from redux_server.database.tables import tasks
from redux_server.parameters import MODELS
from redux_server.tasks.listing import History, Wanted, page_ids
from redux_server.tasks.rows import new_row
from redux_server.tasks.task import NewTask, Outcome, Status
from server.in_process import Api, end_next

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
URL = {"image": "https://example.com/a.png"}
NOON = 1_800_000_000.0
INPUT = {"num_inference_steps": 28, "num_images": 1}


def ask(api: Api, *, key: str | None = None, **body: Any) -> Any:
    return api.post("/api/v3/predictions", json={"page": 1, "page_size": 100, **body}, key=key)


def listed(api: Api, **body: Any) -> list[str]:
    answer = ask(api, **body)
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["data"]["items"]]


def fill(
    engine: Engine,
    count: int,
    *,
    key_id: str = "k",
    at: Callable[[int], float] = lambda i: NOON + i,
    **values: Any,
) -> list[str]:
    """``count`` tasks, the first one the oldest; returns their ids."""
    rows = [
        {**new_row(NewTask(key_id, MODELS[0], INPUT), priority=0, now=at(i)), **values}
        for i in range(count)
    ]
    with engine.begin() as db:
        db.execute(insert(tasks), rows)
    return [row["id"] for row in rows]


@pytest.fixture
def key_id(api: Api) -> str:
    owner = api.services.keys.recognise(api.key)
    assert owner
    return owner


def test_tasks_of_this_key_are_listed_newest_first_as_polls_show_them(api: Api) -> None:
    ids = [api.post(SUBMIT, json=URL).json()["data"]["id"] for _ in range(3)]
    other = api.services.keys.create("other")
    theirs = api.post(SUBMIT, json=URL, key=other).json()["data"]["id"]
    end_next(api.services.store, Outcome(Status.COMPLETED, ["x/1/0.png"], [False], [7]))
    items = ask(api).json()["data"]["items"]
    assert [item["id"] for item in items] == ids[::-1]
    for item in items:
        polled = api.get(f"/api/v3/predictions/{item['id']}/result").json()["data"]
        polled["progress"].pop("queue_position", None)
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


def test_database_that_is_away_is_a_503(build_services: Any, build_api: Any) -> None:
    services: Services = build_services()
    api: Api = build_api(services)
    assert ask(api).status_code == 200
    with services.store._engine.begin() as db:
        db.execute(text("ALTER TABLE tasks RENAME TO hidden"))
    answer = ask(api)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


# --- what it costs --------------------------------------------------------------------------------


@pytest.fixture
def full(either_database: Engine) -> Iterator[Engine]:
    """A database with 3,000 tasks of one key among those of others."""
    engine = either_database
    ended = {"status": Status.COMPLETED, "queued_at": None}
    fill(engine, 3000, **ended)
    for number in range(10):
        fill(engine, 100, key_id=f"other{number}", **ended)
    if not is_sqlite(engine):
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            db.execute(text("VACUUM ANALYZE tasks"))
    yield engine


def test_pages_are_found_in_the_index_alone(full: Engine) -> None:
    asked = [Wanted("k"), Wanted("k", after=NOON + 5, before=NOON + 1500)]
    if is_sqlite(full):  # PostgreSQL knows how few failed, and of so few rows it reads the table
        asked.append(Wanted("k", status=Status.FAILED))
    for wanted in asked:
        statement = page_ids(wanted, number=2, size=50)
        compiled = str(statement.compile(full, compile_kwargs={"literal_binds": True}))
        how = "EXPLAIN QUERY PLAN" if is_sqlite(full) else "EXPLAIN"
        with full.connect() as db:
            plan = "\n".join(str(row) for row in db.exec_driver_sql(f"{how} {compiled}"))
        assert "tasks_listed" in plan, plan
        assert "TEMP B-TREE" not in plan and "Sort" not in plan, plan
        assert ("COVERING INDEX" if is_sqlite(full) else "Index Only Scan") in plan, plan
    history = History(full)
    assert history.count(Wanted("k")) == 3000
    last = history.page(Wanted("k"), number=30, size=100)
    assert [task.created_at for task in last] == [NOON + i for i in range(99, -1, -1)]
    first = history.page(Wanted("k"), number=1, size=1, oldest_first=True)
    assert first == last[-1:]
