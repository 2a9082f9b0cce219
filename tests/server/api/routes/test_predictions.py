"""Submit and poll, as a caller meets them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from e2e.live import a_picture, data_uri
from redux_server.api.coalescer import Coalescer
from redux_server.api.services import Services
from redux_server.parameters import MODELS
from redux_server.storage.blobs import MARKER
from redux_server.tasks.task import Status, Task
from server.in_process import INLINE, SUBMIT, URL, Api, complete, dispatch_of, submit

RESULTS = (
    "/api/v3/predictions/{}",
    "/api/v3/predictions/{}/result",
    "/api/v2/predictions/{}/result",
    "/api/v2/wavespeed-ai/flux/{}/result",
)


def stored(api: Api, task_id: str) -> Task:
    (task,) = api.services.store.get([task_id])
    assert task is not None
    return task


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
    assert dispatch_of(api).wakes == 1


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
    assert dispatch_of(api).wakes == 2
    blobs = tmp_path / "data" / "blobs"
    assert [path for path in blobs.rglob("*") if path.is_file()] == [blobs / MARKER]


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
    blobs = tmp_path / "data" / "blobs"
    assert [path for path in blobs.rglob("*") if path.is_file()] == [blobs / MARKER]


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
