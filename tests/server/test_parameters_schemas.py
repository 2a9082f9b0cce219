"""The request's parameters, and the prediction object clients read (wire contract, section 2)."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from redux_server.api.prediction import envelope, prediction, timestamp
from redux_server.database.tables import tasks
from redux_server.parameters import (
    ALLOWED,
    MODELS,
    PredictionRequest,
    complaint,
    parse_request,
    parse_size,
)
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


# --- parameters -----------------------------------------------------------------------------------


def test_defaults_are_the_documented_ones() -> None:
    parameters = parse_request({"image": "https://example.com/a.png"}).parameters()
    seed = parameters.pop("seed")
    assert parameters == {
        "prompt": "",
        "size": "1024*1024",
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "num_images": 1,
        "enable_safety_checker": True,
    }
    assert 0 <= seed < 2**31


def test_seed_minus_one_is_picked_anew_each_time() -> None:
    request = parse_request({"image": "x", "seed": -1})
    assert len({request.parameters()["seed"] for _ in range(8)}) > 1


def test_seed_zero_stays_zero() -> None:
    assert parse_request({"image": "x", "seed": 0}).parameters()["seed"] == 0


def test_null_is_absent_and_unknown_fields_are_dropped() -> None:
    request = parse_request({"image": "x", "size": None, "prompt": None, "loras": [1]})
    assert request == parse_request({"image": "x"})
    assert "loras" not in request.parameters()


@pytest.mark.parametrize("name", ["exact", "balanced", "fast"])
def test_quality_is_a_parameter_where_it_was_asked_for(name: str) -> None:
    assert parse_request({"image": "x", "quality": name}).parameters()["quality"] == name
    assert "quality" not in parse_request({"image": "x", "quality": None}).parameters()


def test_whole_float_is_taken_as_an_integer() -> None:
    given = parse_request({"image": "x", "seed": 5.0, "num_images": 2.0}).parameters()
    assert (given["seed"], given["num_images"]) == (5, 2)
    assert type(given["seed"]) is int


@pytest.mark.parametrize("name", ["seed", "num_inference_steps", "num_images", "guidance_scale"])
def test_true_is_not_a_number(name: str) -> None:
    with pytest.raises(ValidationError):
        parse_request({"image": "x", name: True})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024*768", (1024, 768)),
        ("512*1536", (512, 1536)),
        ("1024x768", (1024, 768)),
        ("1024X768", (1024, 768)),
        ("1024×768", (1024, 768)),
        (" 1024 * 768 ", (1024, 768)),
        ("777*513", (777, 513)),
    ],
)
def test_size_is_read_in_all_its_spellings(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size
    assert parse_request({"image": "x", "size": text}).size == f"{size[0]}*{size[1]}"


@pytest.mark.parametrize("text", ["511*512", "512*1537", "1024", "a*b", "1024**1024", "-512*512"])
def test_other_size_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


def test_complaint_names_each_wrong_parameter_with_what_is_allowed() -> None:
    with pytest.raises(ValidationError) as caught:
        parse_request({"seed": "7", "num_images": 9})
    text = complaint(caught.value.errors(include_url=False))
    assert f"image is required: {ALLOWED['image']}." in text
    assert f'seed must be {ALLOWED["seed"]}; got "7".' in text
    assert f"num_images must be {ALLOWED['num_images']}; got 9." in text


def test_complaint_shortens_long_values_and_survives_any_value() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for given in ("x" * 100_000, deep, {"a": deep}, "\ud800", float("nan"), 10**300):
        with pytest.raises(ValidationError) as caught:
            parse_request({"image": "x", "num_images": given})
        text = complaint(caught.value.errors(include_url=False))
        assert len(text) < 200
        text.encode("ascii")


def test_every_parameter_has_words_for_errors_and_a_description() -> None:
    fields = PredictionRequest.model_fields
    assert set(ALLOWED) == set(fields)
    assert all(field.description for field in fields.values())


# --- what requests have in common -----------------------------------------------------------------


def test_shape_is_what_has_to_be_equal_to_be_denoised_together() -> None:
    def shape(**more: Any) -> str:
        return PredictionRequest(image="x", **more).shape

    same = [{}, {"seed": 3}, {"guidance_scale": 9.0}, {"num_images": 2}]
    assert len({shape(**more) for more in same}) == 1
    assert shape(prompt="a fox") == shape(prompt="a hen")
    apart = [{}, {"size": "512*512"}, {"num_inference_steps": 4}, {"quality": "fast"}]
    apart += [{"prompt": "a fox"}]
    assert len({shape(**more) for more in apart}) == len(apart)
    longest = shape(size="1536*1536", num_inference_steps=50, quality="balanced", prompt="x")
    assert len(longest) <= tasks.c.shape.type.length


def test_digest_tells_requests_apart_by_what_they_ask_for() -> None:
    def digest(*more: str, **given: Any) -> str:
        return parse_request({"image": "x", **given}).digest(*more)

    same = [{}, {"seed": -1}, {"seed": None}, {"size": "1024x1024"}, {"stranger": 1}]
    assert len({digest(**given) for given in same}) == 1
    assert len(digest()) == 64
    apart = [{}, {"seed": 0}, {"prompt": "y"}, {"image": "y"}, {"quality": "exact"}]
    assert len({digest(**given) for given in apart}) == len(apart)
    assert len({digest(), digest("a"), digest("a", "b"), digest("ab")}) == 4
