"""Which models there are, and the form of their parameters.

The form is made of what validates requests itself: a JSON schema as flat as form builders and tools
expect it, which has every parameter that is added there.
"""

from functools import cache
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from redux_server.api.dependencies import ServicesDep
from redux_server.api.openapi import Success, responses
from redux_server.api.prediction import envelope
from redux_server.api.services import Services
from redux_server.errors import NotFound
from redux_server.parameters import MODELS, requests_of

KIND = "image-to-image"
# Whom to tell is no property of the image, and a form cannot know it.
NOT_IN_THE_FORM = frozenset({"webhook", "webhook_url"})
_KEPT = ("type", "properties", "required")
_DESCRIPTION = (
    "Variations of a picture with FLUX.1 Redux on this server. All its model names are names of "
    "the one model that it runs."
)
router = APIRouter(tags=["models"])


class Model(BaseModel):
    """A model, and how it is called."""

    model_id: str = Field(examples=[MODELS[0]])
    name: str
    description: str
    type: str = Field(examples=[KIND])
    base_price: float = Field(description="Always 0")
    formula: str = Field(description="How the price follows from it")
    sort_order: int
    api_schema: dict[str, Any] = Field(
        description="`api_schemas`: one entry with `type` model_run, `method`, `server`, "
        "`api_path`, and the JSON schema of the parameters as `request_schema`"
    )


class ModelsEnvelope(Success):
    """The answer with the models."""

    data: list[Model]


@router.get(
    "/api/v3/models",
    summary="List the models",
    description="The names under which tasks can be submitted, each with the form of its "
    "parameters.",
    responses=responses(401, 503, model=ModelsEnvelope, description="The models"),
)
async def models(request: Request, services: ServicesDep) -> JSONResponse:
    """Every name that a submit path has."""
    server = _server(request, services)
    return JSONResponse(envelope([_entry(i, name, server) for i, name in enumerate(MODELS)]))


# --- The catalogue of the hosted web site, from which ComfyUI's dynamic nodes build their forms --


CATALOGUE = "/center/default/api/v1/model_product"
catalogue = APIRouter(tags=["models"], include_in_schema=False)


@catalogue.get(CATALOGUE + "/type_statistics")
async def type_statistics() -> JSONResponse:
    """How many models there are of each kind."""
    return JSONResponse(envelope([{"type": KIND, "count": len(MODELS)}]))


@catalogue.get(CATALOGUE + "/search")
async def search(request: Request, services: ServicesDep) -> JSONResponse:
    """A page of the models of the kinds asked for, or of all, whose names have the keyword."""
    asked = request.query_params
    kinds = {each.strip() for text in asked.getlist("types") for each in text.split(",")} - {""}
    keyword = (asked.get("keyword") or asked.get("search") or "").strip().lower()
    number, size = (_whole(asked.get(n), d) for n, d in (("page", 1), ("page_size", 100)))
    is_kind = not kinds or KIND in kinds
    names = [name for name in MODELS if is_kind and keyword in name]
    shown = names[(number - 1) * size : number * size]
    items = [_product(name, request, services) for name in shown]
    page = {"page": number, "page_size": size, "total": len(names), "items": items}
    return JSONResponse(envelope(page))


@catalogue.get(CATALOGUE + "/detail/{name:path}")
async def detail(name: str, request: Request, services: ServicesDep) -> JSONResponse:
    """One model."""
    found = name.strip("/")
    if found not in MODELS:
        raise NotFound(f"No model {name[:100]!r} here; available are {', '.join(MODELS)}.")
    return JSONResponse(envelope(_product(found, request, services)))


def _whole(text: str | None, default: int) -> int:
    is_number = text is not None and text.isascii() and text.isdigit() and int(text[:9]) > 0
    return int(text[:9]) if text is not None and is_number else default


def _product(name: str, request: Request, services: Services) -> dict[str, Any]:
    """A model in the catalogue's words; what submits it is its ``model_uuid``."""
    entry = _entry(MODELS.index(name), name, _server(request, services))
    none: dict[str, Any] = {"cover_url": "", "poster": "", "readme": "", "tags": []}
    return {**entry, **none, "model_uuid": name, "model_name": name, "categories": [KIND]}


def _server(request: Request, services: Services) -> str:
    return (services.settings.public_url or str(request.base_url)).rstrip("/")


def _entry(position: int, model_id: str, server: str) -> dict[str, Any]:
    run = {
        "type": "model_run",
        "method": "POST",
        "server": server,
        "api_path": f"/api/v3/{model_id}",
        "request_schema": request_form(model_id),
    }
    return {
        "model_id": model_id,
        "name": model_id,
        "description": _DESCRIPTION,
        "type": KIND,
        "base_price": 0,
        "formula": "base_price",
        "sort_order": position,
        "api_schema": {"api_schemas": [run]},
    }


@cache
def request_form(model: str = MODELS[0]) -> dict[str, Any]:
    """The form of a task of ``model``; callers must not change it."""
    return form_of(requests_of(model), leave_out=NOT_IN_THE_FORM)


def form_of(model: type[BaseModel], *, leave_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The JSON schema of ``model`` with ``x-order-properties``, and neither references nor nulls.

    "This type or null" becomes this type: clients read a property's ``type`` and ``enum`` and know
    no ``anyOf``, and to leave a parameter out is to give null.
    """
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    properties = {
        name: _flat(each, definitions)
        for name, each in schema["properties"].items()
        if name not in leave_out
    }
    form = {**schema, "properties": properties}
    form["required"] = [name for name in schema.get("required", ()) if name in properties]
    return {name: form[name] for name in _KEPT} | {"x-order-properties": list(properties)}


def _flat(schema: Any, definitions: dict[str, Any]) -> Any:
    """``schema`` without references, nulls and generated titles, at any depth."""
    if isinstance(schema, list):
        return [_flat(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if (reference := schema.get("$ref")) is not None:
        named = definitions[reference.rpartition("/")[2]]
        schema = {**named, **{name: schema[name] for name in schema if name != "$ref"}}
    variants = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    if len(variants) == 1:
        schema = {**variants[0], **{name: schema[name] for name in schema if name != "anyOf"}}
        return _flat(schema, definitions)
    return {
        name: _flat(value, definitions)
        for name, value in schema.items()
        if not (name == "title" and isinstance(value, str))
        and not (name == "default" and value is None)
    }
