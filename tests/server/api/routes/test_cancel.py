"""Cancel and delete over HTTP, with and without a worker on the task."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from obstore.exceptions import GenericError
from prometheus_client import REGISTRY
from sqlalchemy.exc import OperationalError

from e2e.live import LiveServer, a_picture, data_uri, wait_until
from redux_pipelines.fake import SLOW_STEP_S
from redux_server.tasks.task import Outcome, Status
from server.in_process import SUBMIT, Api

DELETE = "/api/v3/predictions/delete"
INLINE = {"image": data_uri(a_picture()), "size": "512*512"}
UNKNOWN = "0" * 32


def submit(api: Api, **more: Any) -> str:
    response = api.post(SUBMIT, json=INLINE, **more)
    assert response.status_code == 200, response.text
    return str(response.json()["data"]["id"])


def cancel(api: Api, task_id: str, **more: Any) -> Any:
    return api.post(f"/api/v3/predictions/{task_id}/cancel", **more)


def get(api: Api, task_id: str) -> Any:
    return api.get(f"/api/v3/predictions/{task_id}/result")


def finish(api: Api, task_id: str) -> list[str]:
    """Have a worker complete it; returns the keys of what it stored."""
    (task,) = api.services.store.claim("w")
    assert task.id == task_id
    key = f"{task_id}/1/0.png"
    api.services.blobs.put(key, a_picture())
    outcome = Outcome(Status.COMPLETED, [key], [False], [1])
    assert api.services.store.finish(task_id, 1, outcome)
    return [f"{task_id}/input", key]


def ended_as_cancelled() -> float:
    labels = {"status": "cancelled", "reason": "1403"}
    return REGISTRY.get_sample_value("flux_redux_tasks_total", labels) or 0.0


# --- cancel ---------------------------------------------------------------------------------------


def test_cancelled_task_is_answered_with_its_reason_and_counted_once(api: Api) -> None:
    task_id = submit(api)
    before = ended_as_cancelled()
    answers = [cancel(api, task_id) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json() == get(api, task_id).json()
    data = answers[0].json()["data"]
    assert (data["status"], data["outputs"]) == ("cancelled", [])
    assert data["error"] == "The task was cancelled at its owner's request."
    assert data["code"] != 0
    assert ended_as_cancelled() == before + 1
    assert api.services.store.claim("w") == []


def test_running_task_is_processing_until_its_worker_has_heard(api: Api) -> None:
    task_id = submit(api)
    api.services.store.claim("w")
    assert cancel(api, task_id).json()["data"]["status"] == "processing"
    assert api.services.store.renew("w", {task_id: (1, 3)}).cancelled == {task_id}


def test_ended_task_is_answered_as_it_is(api: Api) -> None:
    task_id = submit(api)
    finish(api, task_id)
    ended = get(api, task_id).json()
    assert cancel(api, task_id).json() == ended
    assert ended["data"]["status"] == "completed"


@pytest.mark.parametrize("task_id", [UNKNOWN, "x", "A" * 32, "%00", "a" * 500])
def test_unknown_task_cannot_be_cancelled_or_deleted(api: Api, task_id: str) -> None:
    for answer in (
        cancel(api, task_id),
        api.request("DELETE", f"/api/v3/predictions/{task_id}"),
    ):
        assert (answer.status_code, answer.json()["error_code"]) == (404, "not_found")


def test_other_keys_tasks_are_as_unknown_ones(api: Api) -> None:
    mine = submit(api)
    other = api.services.keys.create("other")

    def answers(task_id: str) -> list[tuple[int, str]]:
        asked = [
            cancel(api, task_id, key=other),
            api.request("DELETE", f"/api/v3/predictions/{task_id}", key=other),
            api.post(DELETE, json={"ids": [task_id]}, key=other),
        ]
        return [(each.status_code, each.text.replace(task_id, "")) for each in asked]

    assert answers(mine) == answers(UNKNOWN)
    assert [status for status, _ in answers(mine)] == [404, 404, 200]
    assert get(api, mine).json()["data"]["status"] == "created"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"/api/v3/predictions/{UNKNOWN}/cancel"),
        ("POST", DELETE),
        ("DELETE", f"/api/v3/predictions/{UNKNOWN}"),
    ],
)
def test_nothing_is_done_without_a_key(api: Api, method: str, path: str) -> None:
    assert api.request(method, path, key="").status_code == 401


# --- delete ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_by_one", [True, False])
def test_deleted_task_is_unknown_and_its_pictures_are_gone(api: Api, one_by_one: bool) -> None:
    task_id, kept = submit(api), submit(api)
    keys = finish(api, task_id)
    if one_by_one:
        answer = api.request("DELETE", f"/api/v3/predictions/{task_id}")
    else:
        answer = api.post(DELETE, json={"ids": [task_id]})
    expected = {"code": 200, "message": "success", "data": {"deleted_count": 1}}
    assert (answer.status_code, answer.json()) == (200, expected)
    assert get(api, task_id).status_code == 404
    assert cancel(api, task_id).status_code == 404
    for key in keys:
        with pytest.raises(FileNotFoundError):
            api.services.blobs.get(key)
    assert get(api, kept).json()["data"]["status"] == "created"
    assert api.services.blobs.get(f"{kept}/input") == a_picture()


def test_only_what_there_was_is_counted(api: Api) -> None:
    mine, theirs = submit(api), submit(api, key=api.services.keys.create("other"))
    ids = [mine, mine, theirs, UNKNOWN, "", "../..", mine.upper()]
    assert api.post(DELETE, json={"ids": ids}).json()["data"] == {"deleted_count": 1}
    assert api.post(DELETE, json={"ids": ids}).json()["data"] == {"deleted_count": 0}
    assert api.post(DELETE, json={"ids": []}).json()["data"] == {"deleted_count": 0}
    assert api.services.store.get([theirs]) != [None]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b'{"ids": "x"}', b'{"ids": [1]}', b'{"ids": null}', b'{"id": ["x"]}'),
        b'{"ids": [' + b'"x",' * 1000 + b'"x"]}',
    ],
    ids=lambda body: body[:12].decode(),
)
def test_unusable_list_is_refused(api: Api, body: bytes) -> None:
    answer = api.post(DELETE, content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, 400)
    assert "ids" in answer.json()["message"]


def test_task_is_deleted_though_its_files_cannot_be(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = submit(api)

    def broken(*_: Any) -> None:
        raise GenericError("the disk is away")

    monkeypatch.setattr(type(api.services.blobs), "delete_under", broken)
    assert api.request("DELETE", f"/api/v3/predictions/{task_id}").status_code == 200
    assert get(api, task_id).status_code == 404


def test_database_that_is_away_is_said(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    task_id = submit(api)

    def locked(*_: Any, **__: Any) -> None:
        raise OperationalError("UPDATE", {}, Exception("database is locked"))

    for method in ("cancel", "delete"):
        monkeypatch.setattr(type(api.services.store), method, locked)
    for answer in (
        cancel(api, task_id),
        api.request("DELETE", f"/api/v3/predictions/{task_id}"),
        api.post(DELETE, json={"ids": [task_id]}),
    ):
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0


def test_openapi_describes_cancel_delete_and_the_idempotency_key(api: Api) -> None:
    paths = api.get("/openapi.json", key="").json()["paths"]
    assert "extension" in paths["/api/v3/predictions/{task_id}/cancel"]["post"]["description"]
    assert set(paths["/api/v3/predictions/{task_id}"]) == {"get", "delete"}
    answer = paths[DELETE]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer["$ref"].endswith("DeletedEnvelope")
    parameters = paths[SUBMIT]["post"]["parameters"]
    (header,) = [each for each in parameters if each["in"] == "header"]
    assert (header["name"], header["in"], header["schema"]["maxLength"]) == (
        "Idempotency-Key",
        "header",
        255,
    )
    assert "409" in paths[SUBMIT]["post"]["responses"]


# --- with a worker --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("slow")
    with LiveServer(folder / "data", model="fake-slow") as server:
        yield server


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_device_is_free_within_a_step_of_the_next_heartbeat(slow: LiveServer, how: str) -> None:
    """A task of 4 s is cut short; the one behind it is done long before those would be over."""
    heartbeat_s, margin_s = 0.5, 1.5
    body = {**INLINE, "num_inference_steps": 50, "num_images": 4}
    alone_s = 50 * 4 * SLOW_STEP_S
    long, behind = slow.submit(body), slow.submit({**INLINE, "num_inference_steps": 1})
    wait_until(lambda: slow.get(long["id"])["progress"]["step"] > 0, 30)
    step = slow.get(long["id"])["progress"]["step"]
    with slow.client() as client:
        began = time.monotonic()
        if how == "cancel":
            assert client.post(f"/api/v3/predictions/{long['id']}/cancel").status_code == 200
        else:
            assert client.delete(f"/api/v3/predictions/{long['id']}").status_code == 200
            assert client.get(f"/api/v3/predictions/{long['id']}").status_code == 404
        assert slow.wait(behind["id"])["status"] == "completed"
        took_s = time.monotonic() - began
        if how == "cancel":
            ended = slow.wait(long["id"])
            assert (ended["status"], ended["outputs"]) == ("cancelled", [])
            most = step + (heartbeat_s + margin_s) / SLOW_STEP_S
            assert ended["progress"]["step"] <= most
        else:
            assert client.get(f"/api/v3/predictions/{long['id']}").status_code == 404
    assert took_s < alone_s - step * SLOW_STEP_S, "the device went on with it"
    folder = slow.data_dir / "blobs" / long["id"]
    assert not list(folder.glob("*/*.png")), "an image was made of it"
