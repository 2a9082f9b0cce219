"""The request's parameters: from what a client sends to what a pipeline is given."""

import base64
import io
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from e2e.live import a_picture, data_uri
from redux_pipelines.contract.batching import batch_key, is_solitary
from redux_pipelines.contract.types import GenerationRequest
from redux_pipelines.fake import FakePipeline
from redux_server.database.tables import tasks
from redux_server.net.guard import FetchError
from redux_server.parameters import (
    ALLOWED,
    MODELS,
    Extensions,
    PredictionRequest,
    complaint,
    parse_request,
    parse_size,
    requests_of,
)
from redux_server.storage.blobs import MARKER
from redux_server.tasks.task import Status, Task
from redux_server.worker.inputs import ImageGone, Pictures, generation_request, load_pictures
from server.in_process import Api, Clock
from server.worker_bench import Bench, Images

PATH = f"/api/v3/{MODELS[0]}"
URL, OTHER_URL = "https://example.com/a.png", "https://example.com/b.png"
RED, BLUE = a_picture(40, 40, "red"), a_picture(40, 40, "blue")
STEERED: dict[str, Any] = {
    "image_weights": [1.0, 0.5],
    "redux_strength": 0.8,
    "redux_pooling": 9,
    "fit": "letterbox",
    "empty_prompt": "encode",
    "output_format": "webp",
}


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
        parse_request({"seed": "seven", "num_images": 9})
    text = complaint(caught.value.errors(include_url=False))
    assert f"image is required: {ALLOWED['image']}." in text
    assert f'seed must be {ALLOWED["seed"]}; got "seven".' in text
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


# --- the names of the model, as the hosted service has them --------------------------------------


PRO_REDUX, REDUX_PRO, REDUX_DEV = MODELS


@pytest.mark.parametrize(
    ("model", "body", "expected"),
    [
        (PRO_REDUX, {"size": "512*512"}, {"size": "512*512"}),
        (PRO_REDUX, {"guidance_scale": 20, "seed": 9_999_999_999}, {"guidance_scale": 20}),
        (PRO_REDUX, {"width": 640, "height": 1}, {"size": "1024*1024"}),  # no parameters there
        (REDUX_PRO, {"size": "256*1536"}, {"size": "256*1536"}),
        (REDUX_PRO, {"guidance_scale": 5}, {"guidance_scale": 5}),
        (REDUX_PRO, {"prompt": "a", "num_images": 4}, {"prompt": "a", "num_images": 4}),
        (REDUX_DEV, {"size": "256*256"}, {"size": "256*256", "output_format": "jpeg"}),
        (REDUX_DEV, {"width": 256}, {"size": "256*1024"}),
        (REDUX_DEV, {"height": "768"}, {"size": "1024*768"}),
        (REDUX_DEV, {"width": 640.0, "height": 480}, {"size": "640*480"}),
        (REDUX_DEV, {"width": 640, "height": "", "size": ""}, {"size": "640*1024"}),
        (REDUX_DEV, {"width": 640, "size": "512*512"}, {"size": "512*512"}),
        (REDUX_DEV, {"output_format": "png"}, {"output_format": None}),
        (REDUX_DEV, {"guidance_scale": 20}, {"guidance_scale": 20}),
    ],
)
def test_each_name_has_its_own_parameters(
    model: str, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    given = parse_request({"image": URL, **body}, model).parameters()
    assert {name: given.get(name) for name in expected} == expected
    assert not {"width", "height"} & set(given)


@pytest.mark.parametrize(
    ("model", "body", "text"),
    [
        (PRO_REDUX, {"size": "256*512"}, "each from 512 to 1536"),
        (PRO_REDUX, {"guidance_scale": 20.5}, "a number from 1 to 20;"),
        (REDUX_PRO, {"size": "255*512"}, "each from 256 to 1536"),
        (REDUX_PRO, {"guidance_scale": 5.5}, "a number from 1 to 5;"),
        (REDUX_PRO, {"seed": 2**31}, "an integer from -1 (random) to 2147483647;"),
        (REDUX_DEV, {"size": "256*1537"}, "each from 256 to 1536"),
        (REDUX_DEV, {"width": 255}, "width must be an integer from 256 to 1536; got 255"),
        (REDUX_DEV, {"height": 1537}, "height must be an integer from 256 to 1536"),
        (REDUX_DEV, {"height": "tall"}, 'got "tall"'),
        (REDUX_DEV, {"seed": 2**31}, "to 2147483647;"),
        (REDUX_DEV, {"output_format": "gif"}, "output_format must be one of"),
    ],
)
def test_errors_have_the_ranges_of_the_name(model: str, body: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_request({"image": URL, **body}, model)
    allowed = requests_of(model).allowed
    assert text in complaint(caught.value.errors(include_url=False), allowed)


def test_every_name_has_words_for_all_its_parameters() -> None:
    for model in MODELS:
        assert set(requests_of(model).allowed) == set(requests_of(model).model_fields)


@pytest.mark.parametrize("model", MODELS)
def test_answer_and_error_of_a_name_are_its_own(model: str, api: Api) -> None:
    path = f"/api/v3/{model}"
    small = api.post(path, json={"image": URL, "size": "256*256"})
    refused = api.post(path, json={"image": URL, "size": "1*1"})
    if model == PRO_REDUX:
        assert small.status_code == 400 and "from 512 to" in small.json()["message"]
    else:
        assert small.json()["data"]["input"]["size"] == "256*256"
        assert "from 256 to" in refused.json()["message"]
    assert refused.status_code == 400


def test_small_image_of_a_name_that_has_them_is_made(bench: Bench) -> None:
    asked = parse_request({"image": URL, "width": 256, "height": 300, "seed": 1}, REDUX_DEV)
    task = bench.done(parameters=asked.parameters())
    assert task.status is Status.COMPLETED and task.outcome is not None
    picture = bench.picture(task.outcome.outputs[0])
    assert (picture.size, picture.format) == ((256, 300), "JPEG")


# --- beside the hosted endpoint's -----------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"images": [], "image_weights": [], "mask": None},
        {"images": None, "redux_strength": 1, "redux_pooling": 27.0, "fit": "squash"},
        {"empty_prompt": "zeros", "output_format": "png"},
    ],
)
def test_absent_null_empty_and_default_are_the_same_request(body: dict[str, Any]) -> None:
    plain = parse_request({"image": URL, "seed": 3})
    given = parse_request({"image": URL, "seed": 3, **body})
    assert given == plain
    assert given.parameters() == plain.parameters()
    assert (given.digest(), given.shape) == (plain.digest(), plain.shape)
    assert not set(plain.parameters()) & set(Extensions.model_fields)


def test_what_was_asked_for_is_among_the_parameters() -> None:
    asked = parse_request({"image": URL, "images": [OTHER_URL], **STEERED})
    assert STEERED.items() <= asked.parameters().items()


def test_first_of_images_stands_in_for_an_image_that_is_not_there() -> None:
    alone = parse_request({"images": [URL, OTHER_URL], "image_weights": [1, 2], "seed": 1})
    both = parse_request({"image": URL, "images": [OTHER_URL], "image_weights": [1, 2], "seed": 1})
    assert alone == both
    assert parse_request({"image": None, "images": [URL] * 4}).images == [URL] * 3


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"images": [OTHER_URL] * 4}, "images must be an array of pictures, at most 4"),
        ({"images": [5]}, "images must be an array"),
        ({"image_weights": [1, 2]}, "image_weights must be an array of numbers from 0 to 10, one"),
        ({"images": [OTHER_URL], "image_weights": [1]}, "got an array of 1"),
        ({"image_weights": [-0.1]}, "image_weights must be an array of numbers from 0 to 10"),
        ({"image_weights": [True]}, "got true"),
        ({"redux_strength": 10.1}, "redux_strength must be a number from 0 to 10; got 10.1"),
        ({"redux_strength": float("nan")}, "redux_strength must be a number"),
        ({"redux_pooling": 0}, "redux_pooling must be an integer from 1 to 27; got 0"),
        ({"redux_pooling": 28}, "redux_pooling must be an integer from 1 to 27; got 28"),
        ({"redux_pooling": 2.5}, "got 2.5"),
        ({"fit": "centre"}, 'fit must be one of "squash", "letterbox", "center"; got "centre"'),
        ({"quality": "fsat"}, 'quality must be one of "exact", "balanced", "fast"; got "fsat"'),
        ({"images": "a.txt"}, "images must be an array"),
        ({"image_weights": ["x"]}, 'got "x"'),
        ({"empty_prompt": "none"}, 'empty_prompt must be one of "zeros", "encode"; got "none"'),
        ({"output_format": "gif"}, 'output_format must be one of "png", "jpeg", "webp"'),
    ],
    ids=str,
)
def test_bad_value_is_named_with_what_is_allowed(body: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_request({"image": URL, **body})
    assert text in complaint(caught.value.errors(include_url=False))


@pytest.mark.parametrize(
    ("image", "first"),
    [
        (URL, URL),
        (data_uri(RED), data_uri(RED)),
        (data_uri(RED), data_uri(RED).partition(",")[2]),  # what wavespeed-mcp was given
        (data_uri(RED), "/home/me/my icons/red.png"),
        (data_uri(RED), "red.jpeg"),
    ],
    ids=["URL", "data URI", "its base64", "its file", "its file's name"],
)
def test_image_that_is_named_again_counts_once(image: str, first: str) -> None:
    asked = parse_request({"image": image, "images": [first, OTHER_URL], "image_weights": [1, 2]})
    assert (asked.image, asked.images) == (image, [OTHER_URL])
    assert parse_request({"image": image, "images": [first]}).images == []


def test_another_picture_at_the_head_of_images_is_one_more() -> None:
    for other in (OTHER_URL, data_uri(BLUE), data_uri(BLUE).partition(",")[2]):
        assert parse_request({"image": data_uri(RED), "images": [other]}).images == [other]


@pytest.mark.parametrize("images", [[], [5], "x"], ids=str)
def test_images_of_no_use_do_not_stand_in_for_image(images: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_request({"images": images})
    assert "image " in complaint(caught.value.errors(include_url=False))


def test_schema_lists_extensions_last_with_their_limits_for_a_form() -> None:
    schema = PredictionRequest.model_json_schema()
    names = list(schema["properties"])
    assert names[0] == "image"
    assert names[-len(Extensions.model_fields) :] == list(Extensions.model_fields)
    assert schema["required"] == ["image"]
    strength, pooling = (schema["properties"][f"redux_{name}"] for name in ("strength", "pooling"))
    assert (strength["minimum"], strength["maximum"], strength["default"]) == (0, 10, 1)
    assert (pooling["minimum"], pooling["maximum"], pooling["default"]) == (1, 27, 27)
    assert schema["properties"]["fit"]["enum"] == ["squash", "letterbox", "center"]
    assert all("description" in each for each in schema["properties"].values())


# --- what may share a batch, and what is the same request -----------------------------------------


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


VARIETY: list[dict[str, Any]] = [
    {},
    {"prompt": "a fox"},
    {"empty_prompt": "encode"},
    {"redux_strength": 0.5},
    {"image_weights": [0.5]},
    {"redux_strength": 0.25, "image_weights": [2.0]},
    {"redux_pooling": 9},
    {"redux_pooling": 9, "redux_strength": 0.5},
    {"images": [OTHER_URL]},
    {"images": [OTHER_URL], "image_weights": [1.0, 1.0]},
    {"images": [OTHER_URL], "image_weights": [1.0, 0.5]},
    {"images": [OTHER_URL], "image_weights": [0.5, 1.0]},
    {"images": [OTHER_URL], "redux_strength": 0.5},
    {"fit": "center"},
    {"output_format": "jpeg"},
    {"size": "512*512"},
    {"quality": "fast"},
    {"mask": OTHER_URL},
    {"fit": "letterbox"},
]


def as_the_worker_has_it(asked: PredictionRequest) -> GenerationRequest:
    picture = Image.new("RGB", (9, 9))
    mask = None if asked.mask is None else picture
    return generation_request(
        asked.parameters(), Pictures(picture, (picture,) * len(asked.images), mask)
    )


def test_shape_of_a_task_says_what_the_key_of_its_batch_says() -> None:
    asked = [parse_request({"image": URL, **fields}) for fields in VARIETY]
    for one, other in combinations(asked, 2):
        requests = as_the_worker_has_it(one), as_the_worker_has_it(other)
        if any(map(is_solitary, requests)):
            assert "" in (one.shape, other.shape)
        else:
            is_alike = batch_key(requests[0]) == batch_key(requests[1])
            assert (one.shape == other.shape) == is_alike, (one, other)
    assert max(len(each.shape) for each in asked) + 8 <= tasks.c.shape.type.length


def test_tasks_that_nobody_shares_a_batch_with_have_no_shape() -> None:
    solitary = [{"mask": URL}, {"fit": "letterbox"}]
    assert [parse_request({"image": URL, **each}).shape for each in solitary] == ["", ""]


def test_digest_tells_requests_apart_by_what_they_ask_for() -> None:
    def digest(*more: str, **given: Any) -> str:
        return parse_request({"image": "x", **given}).digest(*more)

    same = [{}, {"seed": -1}, {"seed": None}, {"size": "1024x1024"}, {"stranger": 1}]
    assert len({digest(**given) for given in same}) == 1
    assert len(digest()) == 64
    apart = [{}, {"seed": 0}, {"prompt": "y"}, {"image": "y"}, {"quality": "exact"}]
    assert len({digest(**given) for given in apart}) == len(apart)
    assert len({digest(), digest("a"), digest("a", "b"), digest("ab")}) == 4


# --- submitting -----------------------------------------------------------------------------------


def stored(api: Api, task_id: str) -> Task:
    (task,) = api.services.store.get([task_id])
    assert task is not None
    return task


def files(api: Api) -> list[str]:
    folder = api.services.settings.blobs_dir
    found = {path for path in folder.rglob("*") if path.is_file()} - {folder / MARKER}
    return sorted(path.name for path in found)


def test_inline_pictures_are_stored_beside_the_task_and_not_echoed(api: Api) -> None:
    body = {"image": data_uri(RED), "images": [OTHER_URL, data_uri(BLUE)], "mask": data_uri(RED)}
    answer = api.post(PATH, json=body)
    assert answer.status_code == 200
    data = answer.json()["data"]
    noted = stored(api, data["id"]).input
    prefix = f"blob:{data['id']}"
    assert noted["image"] == f"{prefix}/input"
    assert noted["images"] == [OTHER_URL, f"{prefix}/input-2"]
    assert noted["mask"] == f"{prefix}/mask"
    assert api.services.blobs.get(f"{data['id']}/input-2") == BLUE
    assert data["input"]["images"] == [OTHER_URL]
    assert not {"image", "mask"} & set(data["input"])
    assert "blob:" not in answer.text
    assert base64.b64encode(BLUE).decode() not in answer.text


def test_urls_and_controls_are_echoed(api: Api) -> None:
    body = {"image": URL, "images": [OTHER_URL], "mask": OTHER_URL, **STEERED}
    echoed = api.post(PATH, json=body).json()["data"]["input"]
    assert body.items() <= echoed.items()
    assert files(api) == []


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"images": [OTHER_URL, "no picture"]}, "images[1] must be an http(s) URL"),
        ({"images": ["https://"]}, "images[0] must be a complete http(s) URL"),
        ({"mask": "data:image/png,abc"}, "mask is a data URI without ;base64"),
        ({"mask": "ftp://example.com/a"}, "mask must be an http(s) URL"),
    ],
)
def test_a_picture_that_is_none_is_named_and_nothing_is_stored(
    body: dict[str, Any], text: str, api: Api
) -> None:
    answer = api.post(PATH, json={"image": data_uri(RED), **body})
    assert answer.status_code == 400
    assert text in answer.json()["message"]
    assert files(api) == []


def test_a_store_that_fails_half_way_keeps_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = type(api.services.blobs)
    put = blobs.put

    def fails_on_masks(self: Any, key: str, data: bytes) -> None:
        if key.endswith("/mask"):
            raise OSError(28, "No space left on device")
        put(self, key, data)

    monkeypatch.setattr(blobs, "put", fails_on_masks)
    answer = api.post(PATH, json={"image": data_uri(RED), "mask": data_uri(BLUE)})
    assert answer.status_code == 503
    assert files(api) == []


def test_a_task_that_is_refused_leaves_no_picture(build_api: Callable[..., Api]) -> None:
    api = build_api(max_queue=1)
    assert api.post(PATH, json={"image": URL}).status_code == 200
    answer = api.post(PATH, json={"image": URL, "images": [data_uri(RED)]})
    assert answer.status_code == 429
    assert files(api) == []


def test_same_key_with_other_controls_is_another_request(api: Api) -> None:
    headers = {"Idempotency-Key": "k"}
    first = api.post(PATH, json={"image": URL, "redux_strength": 0.5}, headers=headers)
    again = api.post(PATH, json={"image": URL, "redux_strength": 0.5}, headers=headers)
    assert again.json()["data"]["id"] == first.json()["data"]["id"]
    other = api.post(PATH, json={"image": URL, "redux_strength": 0.6}, headers=headers)
    assert other.status_code == 409


# --- working --------------------------------------------------------------------------------------


class Seeing(FakePipeline):
    """The fake pipeline, which notes what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[GenerationRequest] = []

    def generate_batch(self, requests: Any) -> Any:
        self.asked += requests
        return super().generate_batch(requests)


def test_pipeline_is_given_all_of_it(bench: Bench) -> None:
    pipeline, images = Seeing(), Images()
    parameters = {**STEERED, "images": [OTHER_URL], "mask": "https://example.com/mask.png"}
    task = bench.done(pipeline=pipeline, images=images, parameters=parameters)
    assert task.status is Status.COMPLETED
    (asked,) = pipeline.asked
    assert len(asked.pictures) == 2
    assert asked.mask is not None
    assert asked.image_weights == (1.0, 0.5)
    got = asked.redux_strength, asked.redux_pooling, asked.fit, asked.empty_prompt
    assert got == (0.8, 9, "letterbox", "encode")
    assert sorted(images.loaded) == [URL, OTHER_URL, "https://example.com/mask.png"]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_output_is_of_the_kind_asked_for(kind: str, bench: Bench) -> None:
    task = bench.done(parameters={"output_format": kind, "num_images": 2})
    assert task.outcome is not None
    assert task.outcome.outputs == [f"{task.id}/1/{i}.{kind}" for i in range(2)]
    picture = bench.picture(task.outcome.outputs[0])
    assert (picture.format, picture.size) == (kind.upper(), (512, 520))


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_download_has_the_type_of_the_kind(kind: str, api: Api) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, kind)
    key = f"{'0' * 32}/1/0.{kind}"
    api.services.blobs.put(key, buffer.getvalue())
    answer = api.get(api.services.signer.path(key, 9e11), key="")
    assert answer.headers["content-type"] == f"image/{kind}"


def test_a_picture_that_cannot_be_had_is_named(bench: Bench) -> None:
    class Broken(Images):
        def load(self, reference: str, use: Callable[[Image.Image], Any]) -> Any:
            if reference == OTHER_URL:
                raise FetchError("status", "The host answered 404.")
            return super().load(reference, use)

    task = bench.done(images=Broken(), parameters={"images": [OTHER_URL]})
    assert task.outcome is not None
    assert (task.outcome.code, task.outcome.error) == (1402, "images[0]: The host answered 404.")


def test_errors_of_the_first_picture_stay_as_they_are() -> None:
    gone = ImageGone("The input image is no longer kept by this server.")

    def load(reference: str, use: Callable[[Image.Image], Any]) -> Any:
        raise gone

    for given in ({"image": "x"}, {"image": "x", "mask": "y"}):
        with pytest.raises(ImageGone, match=r"^The input"):
            load_pictures(load, given)


def test_inputs_are_deleted_with_their_task(api: Api, clock: Clock) -> None:
    data = api.post(PATH, json={"image": URL, "images": [data_uri(RED)]}).json()["data"]
    assert files(api) == ["input-1"]
    deleted = api.post("/api/v3/predictions/delete", json={"ids": [data["id"]]})
    assert deleted.json()["data"]["deleted_count"] == 1
    assert files(api) == []
