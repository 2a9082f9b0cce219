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
        ends = [schema[end] for end in ("minimum", "maximum") if end in schema]
        for value in [*ends, *schema.get("enum", ())]:
            assert getattr(parse_request({**REQUIRED, name: value}), name) == value


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
