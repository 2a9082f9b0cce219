"""The API as a whole: submit, poll, download, probes, metrics, sweeps, documentation."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from e2e.live import LiveServer, a_picture, data_uri, plain_client, wait_until
from redux_server import __version__
from redux_server.api import housekeeping
from redux_server.api.coalescer import Coalescer
from redux_server.api.services import Services
from redux_server.dispatch.presence import Presence, WorkerState
from redux_server.parameters import MODELS, PredictionRequest
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Outcome, Status, Task
from server.in_process import Api, IdleDispatch

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
URL = {"image": "https://example.com/a.png"}
INLINE = {"image": data_uri(a_picture())}
RESULTS = (
    "/api/v3/predictions/{}",
    "/api/v3/predictions/{}/result",
    "/api/v2/predictions/{}/result",
    "/api/v2/wavespeed-ai/flux/{}/result",
)


def submit(api: Api, body: Any = URL, **more: Any) -> dict[str, Any]:
    response = api.post(SUBMIT, json=body, **more)
    assert response.status_code == 200, response.text
    data: dict[str, Any] = response.json()["data"]
    return data


def stored(api: Api, task_id: str) -> Task:
    (task,) = api.services.store.get([task_id])
    assert task is not None
    return task


def complete(store: TaskStore, outputs: Callable[[Task], list[str]] = lambda _: []) -> Task:
    """Claim the next task and record it as completed."""
    (task,) = store.claim("host/cpu")
    keys = outputs(task)
    outcome = Outcome(Status.COMPLETED, keys, [False] * len(keys), list(range(len(keys))))
    assert store.finish(task.id, task.attempt, outcome)
    return task


def engine_of(api: Api) -> IdleDispatch:
    assert isinstance(api.services.dispatch, IdleDispatch)
    return api.services.dispatch


# --- submit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("model", MODELS)
def test_each_model_is_served_under_both_versions(api: Api, version: str, model: str) -> None:
    response = api.post(f"/api/{version}/{model}", json=URL)
    assert response.status_code == 200
    data = response.json()["data"]
    assert data["model"] == model
    assert stored(api, data["id"]).model == model


def test_task_is_stored_when_the_answer_comes_and_workers_are_woken(api: Api) -> None:
    data = submit(api)
    assert (data["status"], data["outputs"], data["error"]) == ("created", [], "")
    assert stored(api, data["id"]).status is Status.CREATED
    assert engine_of(api).wakes == 1


def test_url_is_not_fetched_before_the_answer(api: Api) -> None:
    started = time.monotonic()
    submit(api, {"image": "http://10.255.255.1/never-answers.png"})
    assert time.monotonic() - started < 2


def test_all_parameters_are_stored_with_the_seed_picked(api: Api) -> None:
    data = submit(api, {**URL, "size": "512x768", "seed": -1})
    assert stored(api, data["id"]).input == data["input"]
    assert data["input"]["size"] == "512*768"
    assert data["input"]["seed"] >= 0


def test_quality_is_stored_only_if_it_was_asked_for(api: Api) -> None:
    assert submit(api, {**URL, "quality": "fast"})["input"]["quality"] == "fast"
    for given in (URL, {**URL, "quality": None}):
        data = submit(api, given)
        assert "quality" not in data["input"]
        assert "quality" not in stored(api, data["id"]).input
        assert (data["quality"], data["reused_steps"]) == ("", 0)


@pytest.mark.parametrize("quality", ["balanced", "fast"])
def test_tier_that_the_backend_lacks_is_refused_before_anything_is_stored(
    build_api: Callable[..., Api], quality: str
) -> None:
    api = build_api(backend="diffusers")
    response = api.post(SUBMIT, json={**INLINE, "quality": quality})
    assert response.status_code == 400
    refused = response.json()
    other = api.post(SUBMIT, json={**INLINE, "seed": -9}).json()
    assert refused.keys() == other.keys()
    assert refused["code"] == other["code"] == 400
    assert refused["message"] == (
        'quality must be "exact": this server runs --backend diffusers, which has no other; '
        f'got "{quality}".'
    )
    assert not list(api.services.settings.blobs_dir.rglob("*input*"))
    assert api.services.store.claim("host/cpu") == []
    for given in (URL, {**URL, "quality": "exact"}, {**URL, "quality": None}):
        submit(api, given)


def test_inline_picture_is_stored_beside_the_task(api: Api) -> None:
    data = submit(api, INLINE)
    assert stored(api, data["id"]).input["image"] == f"blob:{data['id']}/input"
    assert api.services.blobs.get(f"{data['id']}/input") == a_picture()
    assert "image" not in data["input"]


@pytest.mark.parametrize("image", [INLINE["image"].split(",")[1], INLINE["image"].upper()[:22]])
def test_plain_base64_is_taken_and_a_shouted_data_uri_is_one(api: Api, image: str) -> None:
    whole = image if len(image) > 22 else image + INLINE["image"][22:]
    data = submit(api, {"image": whole})
    assert api.services.blobs.get(f"{data['id']}/input") == a_picture()


def test_full_queue_is_answered_429_and_leaves_nothing_behind(
    build_api: Callable[..., Api], tmp_path: Path
) -> None:
    api = build_api(max_queue=2)
    submit(api)
    submit(api)
    response = api.post(SUBMIT, json=INLINE)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["code"] == 429
    assert "2 open tasks" in response.json()["message"]
    assert engine_of(api).wakes == 2
    assert not [path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()]


def test_database_that_is_away_is_answered_503_and_leaves_nothing_behind(
    build_services: Callable[..., Services], build_api: Callable[..., Api], tmp_path: Path
) -> None:
    def locked(_: Any) -> Any:
        raise OperationalError("INSERT", {}, Exception("database is locked"))

    services = build_services()
    broken = {"accept": Coalescer(locked, name="in"), "find": Coalescer(locked, name="find")}
    for name, coalescer in broken.items():
        getattr(services, name).close()
        object.__setattr__(services, name, coalescer)
    api = build_api(services)
    for response in (api.post(SUBMIT, json=INLINE), api.get(RESULTS[0].format("0" * 32))):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["code"] == 503
    assert not [path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()]


# --- poll -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RESULTS)
def test_every_result_path_gives_the_same_object(api: Api, path: str) -> None:
    data = submit(api)
    answer = api.get(path.format(data["id"])).json()
    answer["data"]["progress"].pop("queue_position", None)  # polls tell it
    assert answer == {"code": 200, "message": "success", "data": data}


def test_url_of_the_answer_leads_back_to_the_task(api: Api) -> None:
    data = submit(api)
    assert data["urls"]["get"].startswith("http://test/")
    polled = api.get(data["urls"]["get"]).json()["data"]
    polled["progress"].pop("queue_position", None)
    assert polled == data


def test_urls_start_with_the_public_url_where_one_is_set(build_api: Callable[..., Api]) -> None:
    api = build_api(public_url="https://flux.example.com/")
    data = submit(api)
    complete(api.services.store, lambda task: [f"{task.id}/1/0.png"])
    assert data["urls"]["get"].startswith("https://flux.example.com/api/v3/predictions/")
    done = api.get(RESULTS[0].format(data["id"])).json()["data"]
    assert done["outputs"][0].startswith("https://flux.example.com/files/")


def test_task_belongs_to_its_key_alone(api: Api) -> None:
    data = submit(api)
    other = api.services.keys.create("other")
    for path in RESULTS:
        foreign = api.get(path.format(data["id"]), key=other)
        unknown = api.get(path.format("0" * 32), key=other)
        assert foreign.status_code == unknown.status_code == 404
        assert foreign.text.replace(data["id"], "") == unknown.text.replace("0" * 32, "")
        assert dict(foreign.headers).keys() == dict(unknown.headers).keys()


def test_result_of_a_revoked_key_is_not_shown(api: Api) -> None:
    data = submit(api)
    (key,) = api.services.keys.list()
    api.services.keys.revoke(key.id)
    assert api.get(RESULTS[0].format(data["id"])).status_code == 401


# --- download -------------------------------------------------------------------------------------


def test_output_is_downloaded_without_a_key(api: Api) -> None:
    data = submit(api)
    api.services.blobs.put(f"{data['id']}/1/0.png", a_picture())
    complete(api.services.store, lambda task: [f"{task.id}/1/0.png"])
    (url,) = api.get(RESULTS[0].format(data["id"])).json()["data"]["outputs"]
    response = api.get(url, key="")
    assert response.status_code == 200
    assert response.content == a_picture()
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "private" in response.headers["cache-control"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"<script>alert(1)</script>", "application/octet-stream"), (a_picture(), "image/png")],
)
def test_content_type_is_what_the_bytes_are(api: Api, data: bytes, kind: str) -> None:
    api.services.blobs.put("a/1/0.png", data)
    response = api.get(api.services.signer.path("a/1/0.png", time.time() + 60))
    assert response.headers["content-type"] == kind


# --- errors ---------------------------------------------------------------------------------------


def test_unexpected_error_is_answered_without_its_text(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a private path")

    monkeypatch.setattr("redux_server.storage.blobs.Blobs.put", broken)
    response = api.post(SUBMIT, json=INLINE)
    assert response.status_code == 500
    body = response.json()
    assert (body["code"], body["data"], body["error_code"]) == (500, None, "internal_error")
    assert "private" not in response.text
    assert submit(api)["status"] == "created", "did not live on"


def test_wrong_method_on_an_unknown_path_is_an_unknown_path(api: Api) -> None:
    for method in ("GET", "PUT", "DELETE"):
        response = api.request(method, "/api/v3/nothing")
        assert (response.status_code, response.json()["code"]) == (404, 404)
        assert "allow" not in response.headers


# --- probes ---------------------------------------------------------------------------------------


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
    loading = {"device": "cuda:0", "state": "loading", "detail": "reading weights"}
    assert state() == (503, "not ready", [loading])
    presence.announce("host/cuda:0", "cuda:0", WorkerState.FAILED, "no weights")
    assert state()[:2] == (503, "not ready")
    presence.announce("host/cuda:1", "cuda:1", WorkerState.READY, "FLUX")
    assert state()[:2] == (200, "ready"), "one of two is enough"
    presence.leave("host/cuda:1")
    assert state()[0] == 503


def test_silent_worker_does_not_count(
    build_services: Callable[..., Services], build_api: Callable[..., Api], database: Engine
) -> None:
    long_ago = Presence(database, clock=lambda: time.time() - 31)
    long_ago.announce("host/cpu", "cpu", WorkerState.READY)
    api = build_api(build_services())
    response = api.get("/readyz")
    assert response.status_code == 503
    assert [worker["state"] for worker in response.json()["workers"]] == ["gone"]


def test_version_says_what_runs(api: Api) -> None:
    body = api.get("/version", key="").json()
    assert body["version"] == __version__
    assert body["model"] == "fake"
    assert set(body) == {"version", "model", "python", "torch", "diffusers"}


def test_lifespan_starts_and_stops_the_engine(build_services: Callable[..., Services]) -> None:
    api = Api(build_services())
    assert engine_of(api).is_started and not engine_of(api).is_stopped
    api.close()
    assert engine_of(api).is_stopped


# --- documentation --------------------------------------------------------------------------------


def test_docs_are_rendered_from_the_schema(api: Api) -> None:
    page = api.get("/docs", key="")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in page.text
    assert "FLUX Redux Server" in page.text


def test_openapi_describes_every_parameter(api: Api) -> None:
    document = api.get("/openapi.json", key="").json()
    operation = document["paths"][SUBMIT]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(PredictionRequest.model_fields)
    assert all(each["description"] for each in schema["properties"].values())
    assert schema["required"] == ["image"]
    steps, seed = schema["properties"]["num_inference_steps"], schema["properties"]["seed"]
    assert (steps["default"], steps["minimum"], steps["maximum"]) == (28, 1, 50)
    assert (seed["minimum"], seed["maximum"]) == (-1, 9_999_999_999)
    assert schema["properties"]["size"]["default"] == "1024*1024"


def test_openapi_is_well_formed(api: Api) -> None:
    text = api.get("/openapi.json", key="").text
    document = json.loads(text)
    assert document["openapi"].startswith("3.")
    assert document["info"]["version"] == __version__
    for reference in set(re.findall(r'"\$ref":\s*"#/([^"]+)"', text)):
        part = document
        for name in reference.split("/"):
            part = part[name]
    ids = []
    for path, methods in document["paths"].items():
        for operation in methods.values():
            ids.append(operation["operationId"])
            declared = {each["name"] for each in operation.get("parameters", ())}
            assert declared >= set(re.findall(r"{(\w+)}", path)), path
            assert operation["responses"]
    assert len(set(ids)) == len(ids)
    assert {SUBMIT, "/api/v2/wavespeed-ai/flux-pro-redux", "/readyz"} <= set(document["paths"])


@pytest.mark.parametrize("path", RESULTS)
def test_another_keys_task_is_answered_byte_for_byte_like_an_unknown_one(
    api: Api, path: str
) -> None:
    task_id = submit(api)["id"]
    stranger = api.services.keys.create("stranger")

    def answer() -> tuple[int, bytes, list[tuple[str, str]]]:
        headers = {"X-Request-ID": "same"}
        response = api.get(path.format(task_id), key=stranger, headers=headers)
        return response.status_code, response.content, response.headers.multi_items()

    foreign = answer()
    api.services.store.delete([task_id])
    assert foreign == answer()
    assert foreign[0] == 404


# --- housekeeping ---------------------------------------------------------------------------------


def at(database: Engine, age_hours: float) -> TaskStore:
    """The store as it was some hours ago."""
    return TaskStore(database, clock=lambda: time.time() - age_hours * 3600)


def ended_task(services: Services, database: Engine, *, age_hours: float) -> Task:
    store = at(database, age_hours)
    parameters = {**PredictionRequest(image="x").parameters(), "image": "blob:x"}
    store.accept([NewTask("key", MODELS[0], parameters)], max_open=1000)
    task = complete(store, lambda task: [f"{task.id}/1/0.png"])
    for key in (f"{task.id}/input", f"{task.id}/1/0.png"):
        services.blobs.put(key, a_picture())
    return task


def test_sweep_deletes_old_tasks_with_all_their_files(
    build_services: Callable[..., Services], database: Engine
) -> None:
    services = build_services(retention_hours=24.0)
    old = ended_task(services, database, age_hours=24.1)
    young = ended_task(services, database, age_hours=23.9)
    assert housekeeping.sweep(services) == 1
    assert [task and task.id for task in services.store.get([old.id, young.id])] == [None, young.id]
    for key in (f"{old.id}/input", f"{old.id}/1/0.png"):
        with pytest.raises(FileNotFoundError):
            services.blobs.get(key)
    assert services.blobs.get(f"{young.id}/1/0.png")
    assert housekeeping.sweep(services) == 0


def test_sweep_keeps_tasks_that_have_not_ended(
    build_services: Callable[..., Services], database: Engine
) -> None:
    services = build_services(retention_hours=1.0)
    parameters = PredictionRequest(image="x").parameters()
    new = [NewTask("key", MODELS[0], parameters) for _ in range(2)]
    at(database, 100).accept(new, max_open=10)
    at(database, 99).claim("host/cpu")
    assert housekeeping.sweep(services) == 0
    assert None not in services.store.get([task.id for task in new])


def test_sweep_deletes_more_than_one_batch(
    build_services: Callable[..., Services], database: Engine
) -> None:
    services = build_services(retention_hours=1.0)
    store = at(database, 50)
    parameters = PredictionRequest(image="x").parameters()
    store.accept([NewTask("key", MODELS[0], parameters) for _ in range(120)], max_open=1000)
    for _ in range(120):
        complete(store)
    assert housekeeping.sweep(services) == 120


def test_sweep_deletes_pictures_whose_task_was_never_accepted(
    build_services: Callable[..., Services],
    database: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = build_services()
    kept = ended_task(services, database, age_hours=0)
    stray = f"{'5' * 32}/input"
    for key in (stray, "sample/photo.jpg"):
        services.blobs.put(key, a_picture())
    assert housekeeping.sweep_strays(services) == 0  # its task may be on its way
    monkeypatch.setattr(housekeeping, "STRAY_AFTER_S", -1.0)
    assert housekeeping.sweep_strays(services) == 1
    with pytest.raises(FileNotFoundError):
        services.blobs.get(stray)
    assert services.blobs.get("sample/photo.jpg")
    assert services.blobs.get(f"{kept.id}/input")


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


def test_full_disk_refuses_an_inline_picture_and_starts_nothing(
    build_services: Callable[..., Services],
    build_api: Callable[..., Api],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = build_services()

    def full(_blobs: object, _key: str, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(services.blobs), "put", full)
    answer = build_api(services).post(f"/api/v3/{MODELS[0]}", json={"image": data_uri(a_picture())})
    assert (answer.status_code, answer.json()["error_code"]) == (503, "unavailable")
    assert services.store.queue_state().waiting == 0


def test_server_sweeps_when_it_starts(
    build_services: Callable[..., Services], build_api: Callable[..., Api], database: Engine
) -> None:
    services = build_services(retention_hours=1.0)
    old = ended_task(services, database, age_hours=2)
    api = build_api(services)
    wait_until(lambda: api.get("/livez") and services.store.get([old.id]) == [None], 10)


# --- metrics --------------------------------------------------------------------------------------


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


def test_log_of_the_server_holds_no_key_no_prompt_and_no_picture(live: LiveServer) -> None:
    body = {**INLINE, "size": "512*512", "num_inference_steps": 1, "prompt": "a private wish"}
    assert live.run(body)["status"] == "completed"
    log = live.log_with("task ended")
    assert live.key not in log
    assert "private wish" not in log
    assert INLINE["image"][30:60] not in log


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "modules", ["redux_server.api.app, redux_server.cli.serve", "redux_server.cli.main"]
)
def test_api_process_loads_no_torch(modules: str) -> None:
    code = f"import {modules}, sys; print([m for m in sys.modules if m.split('.')[0] in HEAVY])"
    heavy = "HEAVY = {'torch', 'diffusers', 'transformers', 'onnxruntime', 'triton'}; "
    done = subprocess.run(
        [sys.executable, "-c", heavy + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_server_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    places = {name: str(temporary) for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME")}
    with LiveServer(tmp_path / "data", env=places) as server:
        assert list(temporary.glob("flux-redux-metrics-*"))
        worker_pids = server.worker_pids()
        assert len(worker_pids) == 1
        assert server.stop() == 0
    assert not list(temporary.iterdir()), "left something in the temporary folder"
    assert "Traceback" not in server.log, server.log
    with pytest.raises(httpx.ConnectError), plain_client() as client:
        client.get(f"{server.base_url}/livez")
