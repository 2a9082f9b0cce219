"""Clients that give up on a held answer and send the same again: one task, not six."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.live import MODEL_PATH, LiveServer, a_picture, data_uri, wait_until

IMAGE = data_uri(a_picture())
BODY = {
    "image": IMAGE,
    "size": "512*512",
    "num_inference_steps": 50,
    "num_images": 3,
    "enable_sync_mode": True,
}
QUICK = {"num_inference_steps": 1, "num_images": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    data: Path = tmp_path_factory.mktemp("rejoining")
    with LiveServer(data / "data", model="fake-slow") as live:
        yield live


def give_up(server: LiveServer, body: dict[str, Any], *, after_s: float = 0.7) -> None:
    with server.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(MODEL_PATH, json=body, timeout=after_s)


def tasks(server: LiveServer) -> set[str]:
    with server.client() as client:
        items = client.post("/api/v3/predictions", json={"page": 1, "page_size": 100}).json()
    return {each["id"] for each in items["data"]["items"]}


def tasks_since(server: LiveServer, before: set[str]) -> set[str]:
    """Those that came; what was given up may be stored a moment later."""
    wait_until(lambda: tasks(server) > before, 10)
    return tasks(server) - before


def stay(server: LiveServer, body: dict[str, Any]) -> tuple[dict[str, Any], httpx.Headers]:
    with server.client() as client:
        answer = client.post(MODEL_PATH, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"], answer.headers


def test_client_that_gives_up_and_asks_again_makes_one_task(server: LiveServer) -> None:
    before = tasks(server)
    body = {**BODY, "prompt": "one"}
    for _ in range(3):
        give_up(server, body)
    data, headers = stay(server, body)
    assert data["status"] == "completed" and headers["idempotent-replayed"] == "true"
    assert tasks(server) - before == {data["id"]}
    again, headers = stay(server, body)
    assert again["id"] != data["id"], "nobody left: this is another request"
    assert "idempotent-replayed" not in headers


def test_other_request_than_the_one_that_was_left_is_a_task_of_its_own(server: LiveServer) -> None:
    before = tasks(server)
    left = {**BODY, "prompt": "left"}
    give_up(server, left)
    (first,) = tasks_since(server, before)
    others = [
        {**left, **QUICK},
        {**left, "enable_sync_mode": False},
        {**left, **QUICK, "image": data_uri(a_picture(32, 32))},
    ]
    for body in others:
        assert stay(server, body)[0]["id"] != first
    assert stay(server, left)[0]["id"] == first


def test_cancelled_task_is_not_joined(server: LiveServer) -> None:
    before = tasks(server)
    body = {**BODY, "prompt": "cancelled"}
    give_up(server, body)
    (first,) = tasks_since(server, before)
    with server.client() as client:
        assert client.post(f"/api/v3/predictions/{first}/cancel").status_code == 200
    assert stay(server, body)[0]["id"] != first
