"""The limits per key, as a caller meets them."""

from collections.abc import Callable
from typing import Any

import pytest

from e2e.live import a_picture, data_uri
from redux_server.api.services import Services
from redux_server.tasks.task import Outcome, Status
from server.in_process import Api, Clock

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
URL = {"image": "https://example.com/a.png"}


def check_429(response: Any, name: str, *says: str) -> None:
    assert response.status_code == 429, response.text
    body = response.json()
    assert set(body) == {"code", "message", "error", "error_code", "data"}
    assert (body["code"], body["error_code"], body["data"]) == (429, name, None)
    assert all(part in body["message"] for part in says), body["message"]
    assert int(response.headers["retry-after"]) >= 1


def test_key_that_submits_too_often_is_told_when_to_come_back(
    build_api: Callable[..., Api],
    build_services: Callable[..., Services],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = build_services(rate_limit=3)
    monkeypatch.setattr(services.rate, "_clock", clock)
    api = build_api(services)
    for _ in range(3):
        assert api.post(SUBMIT, json=URL).status_code == 200
    refused = api.post(SUBMIT, json=URL)
    check_429(refused, "rate_limited", "3 tasks a minute", "20 s")
    assert refused.headers["retry-after"] == "20"
    assert api.services.store.queue_state().waiting == 3
    other = api.services.keys.create("other")
    assert api.post(SUBMIT, json=URL, key=other).status_code == 200
    clock.now += 20
    assert api.post(SUBMIT, json=URL).status_code == 200


def test_polls_are_not_limited(build_api: Callable[..., Api]) -> None:
    api = build_api(rate_limit=1)
    task = api.post(SUBMIT, json=URL).json()["data"]
    statuses = {api.get(f"/api/v3/predictions/{task['id']}/result").status_code for _ in range(20)}
    assert statuses == {200}


def test_refused_for_its_rate_before_its_body_is_read(build_api: Callable[..., Api]) -> None:
    api = build_api(rate_limit=1)
    api.post(SUBMIT, json=URL)
    taken = []

    async def body() -> Any:
        for _ in range(100):
            taken.append(1)
            yield b" " * 1000

    assert api.post(SUBMIT, content=body()).status_code == 429
    assert taken == []


def test_key_with_enough_open_tasks_is_refused_until_one_ends(
    build_api: Callable[..., Api],
) -> None:
    api = build_api(max_open_per_key=2)
    for _ in range(2):
        assert api.post(SUBMIT, json=URL).status_code == 200
    check_429(api.post(SUBMIT, json=URL), "queue_full", "has 2 open tasks")
    assert api.post(SUBMIT, json=URL, key=api.services.keys.create("b")).status_code == 200
    [task] = api.services.store.claim("w")
    assert api.services.store.finish(task.id, task.attempt, Outcome(Status.COMPLETED))
    assert api.post(SUBMIT, json=URL).status_code == 200


def test_picture_of_a_refused_task_is_not_kept(build_api: Callable[..., Api]) -> None:
    api = build_api(max_open_per_key=1)
    body = {"image": data_uri(a_picture())}
    accepted = api.post(SUBMIT, json=body).json()["data"]["id"]
    check_429(api.post(SUBMIT, json=body), "queue_full")
    folders = {
        path.name for path in api.services.settings.blobs_dir.iterdir() if any(path.iterdir())
    }
    assert folders == {accepted}


def test_neither_limit_is_set_by_default(build_services: Callable[..., Services]) -> None:
    settings = build_services().settings
    assert (settings.rate_limit, settings.max_open_per_key) == (0, 0)
