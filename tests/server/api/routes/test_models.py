"""The models and their form: what is in it can be sent, and nothing that can be is missing."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from redux_server.api.routes.models import NOT_IN_THE_FORM, form_of, request_form
from redux_server.parameters import MODELS, PredictionRequest, parse_request
from server.in_process import Api

REQUIRED = {"image": "https://example.com/a.png"}


def schemas_of(value: Any) -> list[dict[str, Any]]:
    """Every object in a JSON schema, at any depth."""
    if isinstance(value, list):
        return [found for each in value for found in schemas_of(each)]
    if not isinstance(value, dict):
        return []
    return [value, *(found for each in value.values() for found in schemas_of(each))]


def test_every_name_that_can_be_submitted_to_is_listed(api: Api) -> None:
    answer = api.get("/api/v3/models").json()
    assert (answer["code"], answer["message"]) == (200, "success")
    assert [each["model_id"] for each in answer["data"]] == list(MODELS)
    for position, model in enumerate(answer["data"]):
        (run,) = model["api_schema"]["api_schemas"]
        assert model["name"] and model["description"]
        assert (model["type"], model["sort_order"]) == ("image-to-image", position)
        assert (model["base_price"], run["type"], run["method"]) == (0, "model_run", "POST")
        assert run["server"] == "http://test"
        submitted = api.post(run["server"] + run["api_path"], json=REQUIRED)
        assert submitted.json()["data"]["model"] == model["model_id"]


def test_form_has_every_parameter_but_whom_to_tell(api: Api) -> None:
    model = api.get("/api/v3/models").json()["data"][0]
    form = model["api_schema"]["api_schemas"][0]["request_schema"]
    assert list(form["properties"]) == form["x-order-properties"]
    assert set(form["properties"]) == set(PredictionRequest.model_fields) - NOT_IN_THE_FORM
    assert set(PredictionRequest.model_fields) >= NOT_IN_THE_FORM, "a name that is gone"
    assert form["type"] == "object" and set(form["required"]) <= set(form["properties"])
    assert form["properties"]["num_inference_steps"] == {
        "type": "integer",
        "default": 28,
        "minimum": 1,
        "maximum": 50,
        "description": "The number of inference steps to perform.",
        "x-ui-component": "slider",
    }
    assert form["properties"]["quality"]["enum"] == ["exact", "balanced", "fast"]


def test_every_property_has_a_type_and_a_description_and_no_reference() -> None:
    form = request_form()
    for name, schema in form["properties"].items():
        assert schema["type"] in ("string", "integer", "number", "boolean", "array", "object"), name
        assert schema["description"], name
        for inner in schemas_of(schema):
            assert not {"$ref", "$defs", "anyOf", "title"} & set(inner), name


def test_defaults_and_ends_of_ranges_are_accepted() -> None:
    given = {name: each["default"] for name, each in request_form()["properties"].items()
             if "default" in each}  # fmt: skip
    assert parse_request({**given, **REQUIRED}) == parse_request(REQUIRED)
    for name, schema in request_form()["properties"].items():
        if name == "size":  # of each side
            assert (schema["minimum"], schema["maximum"]) == (512, 1536)
            continue
        ends = [schema[end] for end in ("minimum", "maximum") if end in schema]
        for value in [*ends, *schema.get("enum", ())]:
            assert getattr(parse_request({**REQUIRED, name: value}), name) == value


CATALOGUE = "/center/default/api/v1/model_product"


def test_catalogue_is_what_dynamic_nodes_ask_for_and_needs_no_key(api: Api) -> None:
    """The questions of wavespeed-comfyui 6b1425b, one after the other, and its submit."""

    def ask(path: str, **query: Any) -> Any:
        answer = api.get(CATALOGUE + path, key="", params=query).json()
        assert answer["code"] == 200
        return answer["data"]

    (kind,) = ask("/type_statistics")
    assert kind == {"type": "image-to-image", "count": len(MODELS)}
    page = ask("/search", page=1, page_size=100, types=kind["type"])
    assert [each["model_name"] for each in page["items"]] == list(MODELS)
    for item in page["items"]:
        product = ask("/detail/" + item["model_uuid"])
        assert product == item
        (run,) = product["api_schema"]["api_schemas"]
        assert run["type"] == "model_run"
        assert run["request_schema"] == request_form(item["model_uuid"])
        submitted = api.post(f"/api/v3/{item['model_uuid']}", json=REQUIRED)
        assert submitted.status_code == 200
    quoted_name = MODELS[0].replace("/", "%2F")
    assert ask("/detail/" + quoted_name)["model_uuid"] == MODELS[0]


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ({"types": "text-to-video"}, 0),
        ({"types": "text-to-video,image-to-image"}, 3),
        ({}, 3),
        ({"page": "2", "page_size": "2"}, 1),
        ({"page": "x", "page_size": "-1"}, 3),
        ({"page": "9" * 40}, 0),
        ({"keyword": "DEV"}, 1),
    ],
)
def test_catalogue_is_searched(api: Api, query: dict[str, str], count: int) -> None:
    data = api.get(CATALOGUE + "/search", params=query, key="").json()["data"]
    assert len(data["items"]) == count


def test_unknown_model_of_the_catalogue_is_named(api: Api) -> None:
    answer = api.get(CATALOGUE + "/detail/wavespeed-ai/other", key="")
    assert answer.status_code == 404 and MODELS[0] in answer.json()["message"]


HOSTED_ORDER = {
    "wavespeed-ai/flux-pro-redux": "image prompt size seed num_inference_steps guidance_scale "
    "num_images enable_safety_checker",
    "wavespeed-ai/flux-redux-pro": "image prompt size seed num_inference_steps guidance_scale",
    "wavespeed-ai/flux-redux-dev": "image size width height num_inference_steps guidance_scale "
    "num_images seed output_format enable_base64_output enable_sync_mode",
}


@pytest.mark.parametrize("model", MODELS)
def test_form_of_a_name_has_the_hosted_order_ranges_and_widgets(model: str) -> None:
    form = request_form(model)
    hosted = HOSTED_ORDER[model].split()
    assert form["x-order-properties"][: len(hosted)] == hosted
    assert list(form["properties"]) == form["x-order-properties"]
    is_first = model == MODELS[0]
    size, seed = form["properties"]["size"], form["properties"]["seed"]
    assert (size["minimum"], size["maximum"]) == (512 if is_first else 256, 1536)
    assert seed["maximum"] == (9_999_999_999 if is_first else 2**31 - 1)
    scale = form["properties"]["guidance_scale"]
    assert scale["maximum"] == (5 if model == MODELS[1] else 20)
    kind = form["properties"]["output_format"]
    assert kind["default"] == ("jpeg" if model == MODELS[2] else "png")
    widgets = {name: each.get("x-ui-component") for name, each in form["properties"].items()}
    assert widgets["image"] == widgets["mask"] == "uploader" and widgets["images"] == "uploaders"
    assert widgets["prompt"] == "textarea" and widgets["num_inference_steps"] == "slider"
    selects = {name for name, each in form["properties"].items() if "enum" in each}
    assert {widgets[name] for name in selects} == {"select"}


@pytest.mark.parametrize("model", MODELS)
def test_defaults_of_a_form_are_what_is_taken_without_them(model: str) -> None:
    properties = request_form(model)["properties"].items()
    given = {name: each["default"] for name, each in properties if "default" in each}
    assert parse_request({**given, **REQUIRED}, model) == parse_request(REQUIRED, model)


class _Inner(BaseModel):
    title: str = "a"


class _Example(BaseModel):
    first: Annotated[int, Field(ge=1)] | None = None
    second: list[_Inner] = Field(default_factory=list, description="Some")
    third: Literal["a", "b"] = "a"
    hidden: str = ""
    title: str


def test_form_of_other_kinds_of_parameters() -> None:
    form = form_of(_Example, leave_out=frozenset({"hidden"}))
    assert form["x-order-properties"] == ["first", "second", "third", "title"]
    assert form["required"] == ["title"]
    assert form["properties"]["first"] == {"type": "integer", "minimum": 1}
    assert form["properties"]["third"] == {"type": "string", "enum": ["a", "b"], "default": "a"}
    inner = form["properties"]["second"]["items"]
    assert inner["properties"] == {"title": {"type": "string", "default": "a"}}


@pytest.mark.parametrize("public_url", ["", "https://redux.example/"])
def test_server_in_the_form_is_how_clients_reach_it(build_api: Any, public_url: str) -> None:
    model = build_api(public_url=public_url).get("/api/v3/models").json()["data"][0]
    server = model["api_schema"]["api_schemas"][0]["server"]
    assert server == (public_url.rstrip("/") or "http://test")
