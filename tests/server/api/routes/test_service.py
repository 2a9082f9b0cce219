"""The server about itself: probes, version, documentation, metrics."""

import time
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

from e2e.live import LiveServer, a_picture, plain_client, wait_until
from redux_server import __version__
from redux_server.api import housekeeping
from redux_server.api.services import Services
from redux_server.dispatch.presence import Presence, WorkerState
from redux_server.tasks.task import NewTask
from server.in_process import INLINE, SUBMIT, Api


@pytest.mark.parametrize("path", ["/health", "/livez"])
def test_process_is_alive_without_any_worker(api: Api, path: str) -> None:
    response = api.get(path, key="")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_server_is_not_ready_before_a_worker_is(api: Api) -> None:
    presence = api.services.presence

    def state() -> tuple[int, str, list[dict[str, str]]]:
        response = api.get("/readyz", key="")
        body = response.json()
        return response.status_code, body["status"], body["workers"]

    assert state() == (503, "not ready", [])
    presence.announce("host/cuda:0", "cuda:0", WorkerState.LOADING, "reading weights")
    loading = {
        **{"device": "cuda:0", "state": "loading", "detail": "reading weights"},
        **{"model": "", "fingerprint": ""},
    }
    assert state() == (503, "not ready", [loading])
    presence.announce("host/cuda:0", "cuda:0", WorkerState.FAILED, "no weights")
    assert state()[:2] == (503, "not ready")
    presence.announce("host/cuda:1", "cuda:1", WorkerState.READY, "FLUX")
    assert state()[:2] == (200, "ready"), "one of two is enough"
    presence.leave("host/cuda:1")
    assert state()[0] == 503


def test_readiness_tells_of_tasks_that_no_worker_takes(api: Api) -> None:
    presence, store = api.services.presence, api.services.store
    presence.announce("a", "cpu", WorkerState.READY, model="mini", fingerprint="aaa/2")
    for fingerprint in ("", "aaa/1", "aaa/2", "bbb/2", "bbb/2"):
        store.accept([NewTask("k", "m", {}, fingerprint=fingerprint)], max_open=9)
    body = api.get("/readyz").json()
    assert body["status"] == "ready"
    assert body["workers"][0]["fingerprint"] == "aaa/2"
    assert body["unserved_tasks"] == [{"accepted_for": "bbb/2", "tasks": 2}]
    gauges = {name: value for (name, _), value in housekeeping.gauges(api.services).items()}
    assert (gauges["num_tasks_unserved"], gauges["workers_alive"]) == (2, 1)


def test_silent_worker_does_not_count(
    build_services: Callable[..., Services], build_api: Callable[..., Api], database: Engine
) -> None:
    long_ago = Presence(database, clock=lambda: time.time() - 31)
    long_ago.announce("host/cpu", "cpu", WorkerState.READY)
    api = build_api(build_services())
    response = api.get("/readyz")
    assert response.status_code == 503
    assert [worker["state"] for worker in response.json()["workers"]] == ["gone"]


@pytest.mark.parametrize("path", ["/livez", "/health", "/readyz", "file"])
def test_head_is_answered_like_get_without_a_body(
    build_services: Callable[..., Services], build_api: Callable[..., Api], path: str
) -> None:
    services = build_services()
    services.blobs.put("sample/photo.jpg", a_picture())
    if path == "file":
        path = services.signer.path("sample/photo.jpg", time.time() + 60)
    api = build_api(services)
    got, head = api.request("GET", path), api.request("HEAD", path)
    assert (head.status_code, head.content) == (got.status_code, b"")


def test_version_says_what_runs(api: Api) -> None:
    body = api.get("/version", key="").json()
    assert body["version"] == __version__
    assert body["model"] == "", "nobody runs anything, whatever the settings say"
    presence = api.services.presence
    presence.announce("a", "cuda:0", WorkerState.READY, model="FLUX.1-dev", fingerprint="a/1")
    presence.announce("b", "cuda:1", WorkerState.READY, model="mini", fingerprint="b/1")
    presence.announce("c", "cuda:2", WorkerState.READY, model="mini", fingerprint="b/1")
    assert api.get("/version", key="").json()["model"] == "FLUX.1-dev, mini"
    assert set(body) == {"version", "model", "python", "torch", "diffusers"}


def test_docs_are_rendered_from_the_schema(api: Api) -> None:
    page = api.get("/docs", key="")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in page.text
    assert "FLUX Redux Server" in page.text


def scrape(server: LiveServer) -> dict[str, float]:
    """Every sample by its name and labels."""
    with plain_client() as client:
        response = client.get(f"{server.base_url}/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        sample.name + "".join(f"|{name}={value}" for name, value in sorted(sample.labels.items())):
        sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }  # fmt: skip


def test_metrics_count_what_was_done(live: LiveServer) -> None:
    body = {**INLINE, "size": "512*512", "num_inference_steps": 1}
    before = scrape(live)
    for _ in range(2):
        assert live.run(body)["status"] == "completed"
    assert live.run({**body, "image": "http://10.0.0.1/a.png"})["status"] == "failed"
    with live.client() as client:
        assert client.post(SUBMIT, json={**body, "seed": -9}).status_code == 400
    expected = {
        "flux_redux_tasks_accepted_total": 3,
        "flux_redux_tasks_total|reason=|status=completed": 2,
        "flux_redux_tasks_total|reason=1402|status=failed": 1,
        "flux_redux_fetch_blocked_total|reason=address": 1,
        "flux_redux_task_e2e_seconds_count": 3,
        "flux_redux_task_queue_seconds_count": 3,
        "flux_redux_stage_seconds_count|stage=safety": 2,
        f"flux_redux_http_request_duration_seconds_count|method=POST|route={SUBMIT}|status=200": 3,
        f"flux_redux_http_request_duration_seconds_count|method=POST|route={SUBMIT}|status=400": 1,
    }

    def counted() -> dict[str, float]:
        now = scrape(live)
        return {name: now.get(name, 0) - before.get(name, 0) for name in expected}

    # The worker tells of an end just after it is stored.
    wait_until(lambda: counted() == expected, 5, what=lambda: str(counted()))
    now = scrape(live)
    assert now["flux_redux_workers_alive"] == 1
    assert now["flux_redux_num_tasks_waiting"] == now["flux_redux_num_tasks_running"] == 0
    assert now["flux_redux_disk_free_bytes"] > 0
