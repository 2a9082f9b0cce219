"""A database that goes away in mid-run shows as 503, never as 500, and the process stays alive."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from redux_server.api.routes import service
from redux_server.dispatch.presence import WorkerState
from server.in_process import SUBMIT, URL, Api, submit

AWAY = [
    OperationalError("SELECT", {}, Exception("server closed the connection")),
    InterfaceError("SELECT", {}, Exception("the connection is closed")),
    PoolTimeout("QueuePool limit reached"),
]
EACH = pytest.mark.parametrize("error", AWAY, ids=lambda error: type(error).__name__)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@EACH
def test_readyz_says_that_the_database_is_away_and_livez_does_not_care(
    api: Api, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.services.presence.announce("w", "cpu", WorkerState.READY)
    assert api.get("/readyz").status_code == 200
    monkeypatch.setattr(api.services.presence, "all", failing(error))
    answer = api.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["reason"] == "the database does not answer"
    assert api.get("/livez").status_code == 200


def test_readyz_does_not_wait_for_a_frozen_database(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "DATABASE_PATIENCE_S", 0.2)
    thaws = threading.Event()
    monkeypatch.setattr(api.services.presence, "all", lambda: [thaws.wait(60)][1:])
    answer = api.get("/readyz")
    thaws.set()
    assert answer.status_code == 503
    assert answer.json()["reason"] == "the database does not answer"


@EACH
def test_metrics_are_shown_without_what_the_database_would_tell(
    api: Api, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = api.get("/metrics").text
    assert "flux_redux_database_up 1.0" in before and "flux_redux_num_tasks_waiting" in before
    monkeypatch.setattr(api.services.store, "queue_state", failing(error))
    answer = api.get("/metrics")
    assert answer.status_code == 200
    assert "flux_redux_database_up 0.0" in answer.text
    assert "flux_redux_disk_free_bytes" in answer.text
    assert "flux_redux_num_tasks_waiting" not in answer.text  # 0 would be a lie


def test_metrics_do_not_wait_for_a_frozen_database(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "DATABASE_PATIENCE_S", 0.2)
    thaws, read = threading.Event(), api.services.store.queue_state
    monkeypatch.setattr(api.services.store, "queue_state", lambda: [thaws.wait(60), read()][1])
    text = api.get("/metrics").text
    thaws.set()
    assert "flux_redux_database_up 0.0" in text


@EACH
def test_a_key_that_cannot_be_checked_is_neither_right_nor_wrong(
    api: Api, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.services.keys, "_look_up", failing(error))
    answer = api.get("/api/v3/predictions/0/result", key="frs_never-seen-before")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    monkeypatch.undo()
    assert api.get("/api/v3/predictions/0/result", key="frs_never-seen-before").status_code == 401


@EACH
def test_a_poll_is_answered_503(
    build_api: Callable[..., Api], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = build_api()
    monkeypatch.setattr(api.services.find, "_run", failing(error))
    answer = api.get(f"/api/v3/predictions/{'0' * 32}/result")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


INLINE = {"image": "R0lGODlhAQABAAAAACwAAAAAAQABAAA="}
DAY = {"start_time": "2026-01-01T00:00:00Z", "end_time": "2026-01-02T00:00:00Z"}


@EACH
@pytest.mark.parametrize(
    ("part", "call", "method", "path", "body"),
    [
        ("history", "page", "POST", "/api/v3/predictions", {"page": 1, "page_size": 1}),
        ("history", "count", "POST", "/api/v3/billings/search", {"page": 1}),
        ("history", "count_by_day", "POST", "/api/v3/user/usage_stats", DAY),
        ("store", "cancel", "POST", f"/api/v3/predictions/{'0' * 32}/cancel", {}),
        ("store", "delete", "DELETE", f"/api/v3/predictions/{'0' * 32}", None),
        ("webhooks", "secret", "GET", "/api/v3/webhook/secret", None),
        ("idempotency", "recall", "POST", SUBMIT, INLINE),
        ("idempotency", "knows", "POST", SUBMIT, {**INLINE, "unknown": "x" * 2**17}),
        ("reservations", "reserve", "POST", SUBMIT, INLINE),
    ],
)
def test_whatever_needs_the_database_is_answered_503(
    build_api: Callable[..., Api],
    error: Exception,
    part: str,
    call: str,
    method: str,
    path: str,
    body: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    api = build_api(max_queue=0 if call == "knows" else 9)
    monkeypatch.setattr(type(getattr(api.services, part)), call, failing(error))
    more: dict[str, Any] = {} if body is None else {"json": body}
    answer = api.request(method, path, headers={"Idempotency-Key": "k"}, **more)
    assert (answer.status_code, answer.json()["error_code"]) == (503, "unavailable"), answer.text
    assert answer.headers["retry-after"] == "2"


@pytest.mark.parametrize("is_broken", [False, True], ids=["refused", "connection broke"])
def test_a_picture_stays_while_its_task_may_be_stored(
    api: Api, is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OperationalError("COMMIT", {}, Exception("?"), connection_invalidated=is_broken)
    monkeypatch.setattr(api.services.accept, "_run", failing(error))
    answer = api.post(SUBMIT, json={"image": "R0lGODlhAQABAAAAACwAAAAAAQABAAA="})
    assert answer.status_code == 503
    assert bool(list(api.services.settings.blobs_dir.rglob("input"))) is is_broken


# --- Tables of another version --------------------------------------------------------------------


def test_a_missing_column_is_said_to_be_one(
    api: Api, database: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    task = submit(api)
    with database.begin() as db:
        db.execute(text("ALTER TABLE tasks RENAME COLUMN crashes TO crashed"))
        db.execute(text("ALTER TABLE workers RENAME COLUMN detail TO details"))
    path = f"/api/v3/predictions/{task['id']}/result"
    for answer in (api.get(path), api.post(SUBMIT, json=URL)):
        assert answer.status_code == 503
        assert "tables of another version" in answer.json()["message"]
        assert "upgrade" in answer.json()["message"]
    assert "run `flux-redux db upgrade`" in capsys.readouterr().out
    ready = api.get("/readyz")
    assert ready.status_code == 503
    assert "db upgrade" in ready.json()["reason"] and "detail" in ready.json()["reason"]
    assert api.get("/metrics").status_code == 200


def test_a_key_that_cannot_be_looked_for_is_no_database_that_is_away(
    api: Api, database: Engine
) -> None:
    with database.begin() as db:
        db.execute(text("ALTER TABLE keys RENAME COLUMN digest TO digests"))
    answer = api.get("/api/v3/predictions/0/result", key="frs_never-seen-before")
    assert answer.status_code == 503
    assert "tables of another version" in answer.json()["message"]
