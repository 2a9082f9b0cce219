"""The prediction object clients read (wire contract, section 2)."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest

from redux_server.api.prediction import envelope, prediction, public_input, timestamp
from redux_server.parameters import MODELS
from redux_server.tasks.task import Outcome, Status, Task

BASE_URL = "http://host:8000"
ID = "45b392b22c3b449fa935bd4dc2219dfe"
INPUT = {
    "prompt": "a fox",
    "size": "1024*768",
    "seed": 7,
    "num_inference_steps": 28,
    "guidance_scale": 3.5,
    "num_images": 2,
    "enable_safety_checker": True,
    "image": "https://example.com/a.png",
}
COMPLETED = Outcome(
    status=Status.COMPLETED,
    outputs=[f"{ID}/1/0.png", f"{ID}/1/1.png"],
    has_nsfw_contents=[False, True],
    seeds=[7, 8],
    timings={"inference": 1234, "fetch": 10},
    quality="balanced",
    reused_steps=16,
)
OUTCOMES = {
    Status.CREATED: None,
    Status.PROCESSING: None,
    Status.COMPLETED: COMPLETED,
    Status.FAILED: Outcome.failure(1402, "The host did not answer."),
    Status.CANCELLED: Outcome(status=Status.CANCELLED, error="Cancelled."),
}
STATES = list(OUTCOMES)


def a_task(status: Status, **changes: Any) -> Task:
    has_started = status is not Status.CREATED
    fields: dict[str, Any] = {
        "id": ID,
        "key_id": "k",
        "model": MODELS[0],
        "status": status,
        "input": dict(INPUT),
        "request_id": "r",
        "created_at": 1_763_822_400.1234,
        "started_at": 1_763_822_401.0 if has_started else None,
        "finished_at": 1_763_822_402.0 if status.is_terminal else None,
        "attempt": int(has_started),
        "crashes": 0,
        "progress_step": 5 if has_started else 0,
        "outcome": OUTCOMES[status],
    }
    return Task(**{**fields, **changes})


def sign(key: str, ended: float) -> str:
    return f"/files/s/{int(ended)}/{key}"


def data_of(status: Status, **changes: Any) -> dict[str, Any]:
    return prediction(a_task(status, **changes), base_url=BASE_URL, sign=sign)


@pytest.fixture(params=STATES, ids=[str(state) for state in STATES])
def data(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The prediction object of a task in each state."""
    return data_of(request.param)


class TestPrediction:
    """One test per rule that some client needs."""

    def test_has_every_field_in_every_state(self, data: dict[str, Any]) -> None:
        assert set(data) >= {
            "id", "model", "input", "outputs", "urls", "has_nsfw_contents", "status", "created_at",
            "error", "code", "executionTime", "timings",
        }  # fmt: skip

    def test_id_is_32_lower_hex(self, data: dict[str, Any]) -> None:
        assert re.fullmatch(r"[0-9a-f]{32}", data["id"])

    def test_outputs_are_absolute_urls_and_never_null(self, data: dict[str, Any]) -> None:
        assert isinstance(data["outputs"], list)
        assert all(re.match(r"http://host:8000/files/.+\.png$", url) for url in data["outputs"])
        assert len(data["outputs"]) == (2 if data["status"] == "completed" else 0)

    def test_url_to_ask_next_is_absolute(self, data: dict[str, Any]) -> None:
        assert data["urls"]["get"] == f"{BASE_URL}/api/v3/predictions/{ID}/result"

    def test_nsfw_flags_are_bools_one_per_output(self, data: dict[str, Any]) -> None:
        assert isinstance(data["has_nsfw_contents"], list)
        assert all(type(flag) is bool for flag in data["has_nsfw_contents"])
        assert len(data["has_nsfw_contents"]) == len(data["outputs"])

    def test_error_is_a_string_empty_when_there_is_none(self, data: dict[str, Any]) -> None:
        assert isinstance(data["error"], str)
        assert bool(data["error"]) == (data["status"] in ("failed", "cancelled"))

    def test_execution_time_is_whole_milliseconds(self, data: dict[str, Any]) -> None:
        assert type(data["executionTime"]) is int
        assert data["executionTime"] == (1234 if data["status"] == "completed" else 0)

    def test_timings_are_numbers_with_inference_among_them(self, data: dict[str, Any]) -> None:
        assert data["timings"]["inference"] == data["executionTime"]
        assert all(type(value) is int for value in data["timings"].values())

    def test_code_is_zero_unless_failed(self, data: dict[str, Any]) -> None:
        assert data["code"] == (1402 if data["status"] == "failed" else 0)

    def test_created_at_is_rfc_3339_with_milliseconds(self, data: dict[str, Any]) -> None:
        assert data["created_at"] == "2025-11-22T14:40:00.123Z"

    def test_status_is_one_that_clients_know(self, data: dict[str, Any]) -> None:
        assert data["status"] in ("created", "processing", "completed", "failed", "cancelled")

    def test_model_is_the_one_asked_for(self, data: dict[str, Any]) -> None:
        assert data["model"] == "wavespeed-ai/flux-pro-redux"

    def test_input_is_echoed(self, data: dict[str, Any]) -> None:
        assert data["input"] == INPUT

    def test_is_plain_json(self, data: dict[str, Any]) -> None:
        assert json.loads(json.dumps(data, allow_nan=False)) == data

    def test_envelope_has_code_200_and_no_error(self, data: dict[str, Any]) -> None:
        assert envelope(data) == {"code": 200, "message": "success", "data": data}


def test_inline_picture_is_not_echoed() -> None:
    data = data_of(Status.CREATED, input={**INPUT, "image": f"blob:{ID}/input"})
    assert "image" not in data["input"]
    assert ID + "/input" not in json.dumps(data)


def test_echo_of_a_prompt_that_looks_like_a_stored_picture() -> None:
    task = a_task(Status.CREATED, input={**INPUT, "prompt": "blob:x"})
    assert public_input(task)["prompt"] == "blob:x"
    assert data_of(Status.CREATED, input=task.input)["input"]["image"] == INPUT["image"]


def test_outputs_are_signed_from_the_moment_the_task_ended() -> None:
    assert data_of(Status.COMPLETED)["outputs"][0] == f"{BASE_URL}/files/s/1763822402/{ID}/1/0.png"


def test_seeds_of_the_images_are_told() -> None:
    assert data_of(Status.COMPLETED)["seeds"] == [7, 8]
    assert data_of(Status.PROCESSING)["seeds"] == []


def test_tier_and_reused_steps_are_told_once_they_are_known() -> None:
    done, waiting = data_of(Status.COMPLETED), data_of(Status.PROCESSING)
    assert (done["quality"], done["reused_steps"]) == ("balanced", 16)
    assert (waiting["quality"], waiting["reused_steps"]) == ("", 0)


@pytest.mark.parametrize(
    ("status", "step"),
    [(Status.CREATED, 0), (Status.PROCESSING, 5), (Status.FAILED, 5), (Status.COMPLETED, 56)],
)
def test_progress_counts_the_steps_of_all_images(status: Status, step: int) -> None:
    assert data_of(status)["progress"] == {"step": step, "total_steps": 56}


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05.000Z"),
        (datetime(2026, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC), "2026-12-31T23:59:59.999Z"),
    ],
)
def test_timestamp_always_has_three_decimals(moment: datetime, text: str) -> None:
    assert timestamp(moment.timestamp()) == text
