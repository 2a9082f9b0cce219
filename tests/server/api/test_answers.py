"""Outputs as plain base64: on polls, in small pieces, and what is told when they are gone."""

import asyncio
import base64
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import StreamingResponse

from redux_server.api.answers import base64_answer
from redux_server.api.services import Services
from redux_server.parameters import PredictionRequest
from redux_server.storage.blobs import Blobs, StorageError
from redux_server.tasks.task import Outcome, Status
from server.in_process import SUBMIT, Api, end_next

BODY = {"image": "https://example.com/a.png", "enable_base64_output": True}
SIZES = (1, 2, 3, 1000, 2**20 + 1)  # 2^20 + 1: several pieces, none of them a multiple of 3
IMAGES = [random.Random(size).randbytes(size) for size in SIZES]
KEYS = [f"{'a' * 32}/1/{place}.png" for place in range(len(SIZES))]


def submit(api: Api, **more: Any) -> Any:
    return api.post(SUBMIT, json={**BODY, **more})


def complete(api: Api, images: list[bytes] = IMAGES) -> list[str]:
    """End the next task with ``images``."""
    for key, image in zip(KEYS, images, strict=False):
        api.services.blobs.put(key, image)
    keys = KEYS[: len(images)]
    outcome = Outcome(Status.COMPLETED, keys, [False] * len(keys), list(range(len(keys))))
    assert end_next(api.services.store, outcome) is not None
    return keys


def poll(api: Api, task_id: str, path: str = "/api/v3/predictions/{}/result") -> Any:
    return api.get(path.format(task_id))


PATHS = (
    "/api/v3/predictions/{}/result", "/api/v3/predictions/{}", "/api/v2/predictions/{}/result",
    "/api/v2/wavespeed-ai/flux/{}/result",
)  # fmt: skip


def test_polls_show_the_very_images_in_plain_base64(api: Api) -> None:
    created = submit(api).json()["data"]
    assert (created["outputs"], created["input"]["enable_base64_output"]) == ([], True)
    assert poll(api, created["id"]).json()["data"]["outputs"] == []
    complete(api)
    for path in PATHS:
        answer = poll(api, created["id"], path)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["content-length"] == str(len(answer.content))
        assert answer.headers["cache-control"] == "no-store"
        data = answer.json()["data"]
        assert [base64.b64decode(each, validate=True) for each in data.pop("outputs")] == IMAGES
        assert (data["status"], data["error"], data["code"]) == ("completed", "", 0)


def test_all_but_the_outputs_is_as_without(api: Api) -> None:
    with_, without = (submit(api, enable_base64_output=on).json()["data"] for on in (True, False))
    for _ in range(2):
        complete(api)
    shown = [poll(api, task["id"]).json()["data"] for task in (with_, without)]
    assert list(shown[0]) == list(shown[1]) == list(with_), "and in the same order"
    assert all(url.startswith("http://test/files/") for url in shown[1]["outputs"])
    assert "enable_base64_output" not in shown[1]["input"], "the default is not echoed"


@pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
def test_task_without_images_has_none(api: Api, status: Status) -> None:
    task_id = submit(api).json()["data"]["id"]
    end_next(api.services.store, Outcome(status=status, code=1403, error="why"))
    data = poll(api, task_id).json()["data"]
    assert (data["status"], data["outputs"], data["error"]) == (status.value, [], "why")


def test_replay_has_the_images_too(api: Api) -> None:
    headers = {"Idempotency-Key": "one"}
    first = api.post(SUBMIT, json=BODY, headers=headers).json()["data"]
    complete(api, [b"image"])
    again = api.post(SUBMIT, json=BODY, headers=headers)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["data"]["id"] == first["id"]
    assert again.json()["data"]["outputs"] == [base64.b64encode(b"image").decode()]
    other = api.post(SUBMIT, json={**BODY, "enable_base64_output": False}, headers=headers)
    assert other.status_code == 409, "URLs are another answer"


def test_other_keys_task_is_unknown(api: Api) -> None:
    task_id = submit(api).json()["data"]["id"]
    complete(api)
    other = api.services.keys.create("other")
    assert api.get(f"/api/v3/predictions/{task_id}", key=other).status_code == 404


def test_images_that_are_gone_are_a_410(api: Api) -> None:
    task_id = submit(api).json()["data"]["id"]
    complete(api)
    api.services.blobs.delete_under("a" * 32)
    answer = poll(api, task_id)
    assert (answer.status_code, answer.json()["error_code"]) == (410, "expired")
    assert "no longer kept" in answer.json()["error"]


class Away(Blobs):
    """Opens nothing."""

    async def open(self, key: str, *, first: int = 0, end: int | None = None) -> Any:
        raise StorageError("away")


def test_store_that_is_away_is_a_503_that_clients_repeat(
    build_services: Callable[..., Services], build_api: Callable[..., Api], tmp_path: Path
) -> None:
    api = build_api(replace(build_services(), blobs=Away(tmp_path)))
    task_id = submit(api).json()["data"]["id"]
    complete(api)
    answer = poll(api, task_id)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_webhook_and_base64_is_refused_in_the_words_of_the_hosted_service(api: Api) -> None:
    for more in ({"webhook_url": "https://example.com/"}, {"webhook": "https://example.com/"}):
        answer = submit(api, **more)
        assert answer.status_code == 400
        assert answer.json()["error"] == (
            "webhook callback does not support base64 output, please use the normal API to use "
            "base64 output"
        )
    query = api.post(f"{SUBMIT}?webhook=https://example.com/", json=BODY)
    assert query.status_code == 400
    assert api.services.store.queue_state().waiting == 0


@pytest.mark.parametrize("given", ["yes", 1, [], {}])
@pytest.mark.parametrize("name", ["enable_base64_output", "enable_sync_mode"])
def test_flag_that_is_none_is_told(api: Api, name: str, given: Any) -> None:
    answer = api.post(SUBMIT, json={**BODY, name: given})
    assert answer.status_code == 400
    assert f"{name} must be true or false" in answer.json()["message"]


def test_null_is_the_default(api: Api) -> None:
    assert submit(api, enable_base64_output=None, enable_sync_mode=None).status_code == 200


def test_answer_comes_in_small_pieces_and_costs_no_more_memory_than_they_do(
    tmp_path: Path,
) -> None:
    """Four images of 8 MiB: no piece is nearly as large, whatever reads them."""
    import tracemalloc

    blobs = Blobs(tmp_path)
    keys = KEYS[:4]
    for key in keys:
        blobs.put(key, bytes(8 * 2**20))
    data = {"id": "x", "outputs": [], "error": ""}

    async def read() -> tuple[int, int]:
        answer = await base64_answer(data, keys, blobs, None)
        assert isinstance(answer, StreamingResponse)
        sizes = [len(piece) async for piece in answer.body_iterator]
        assert sum(sizes) == int(answer.headers["content-length"])
        return max(sizes), len(sizes)

    tracemalloc.start()
    try:
        largest, count = asyncio.run(read())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest < 2**20 and count > 100
    assert peak < 8 * 2**20


def test_digest_of_old_requests_is_what_it_was() -> None:
    """Neither field is in the digest unless it was asked for, so stored keys stay good."""
    plain = PredictionRequest(image="x")
    assert plain.digest("m") == PredictionRequest(image="x", enable_sync_mode=True).digest("m")
    assert plain.digest("m") != PredictionRequest(image="x", enable_base64_output=True).digest("m")


def test_event_loop_is_not_kept_for_long(tmp_path: Path) -> None:
    """While 64 MiB are read and encoded, others get their turn: never is it kept for 0.5 s."""
    blobs = Blobs(tmp_path)
    for key in KEYS[:4]:
        blobs.put(key, bytes(16 * 2**20))

    async def both() -> float:
        longest, last, is_done = 0.0, time.monotonic(), False

        async def tick() -> None:
            nonlocal longest, last
            while not is_done:
                await asyncio.sleep(0)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()

        ticking = asyncio.create_task(tick())
        answer = await base64_answer({"id": "x", "outputs": [], "error": ""}, KEYS[:4], blobs, None)
        assert isinstance(answer, StreamingResponse)
        async for _ in answer.body_iterator:
            pass
        is_done = True
        await ticking
        return longest

    assert asyncio.run(both()) < 0.5
