"""Which models there are, and the form of their parameters."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from redux_server.model_form import request_form
from redux_server.openapi import Success, responses
from redux_server.routes import Parts
from redux_server.schemas import MODELS, envelope

KIND = "image-to-image"
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
async def models(request: Request, parts: Parts) -> JSONResponse:
    """Every name that a submit path has."""
    server = (parts.settings.public_url or str(request.base_url)).rstrip("/")
    return JSONResponse(envelope([_entry(i, name, server) for i, name in enumerate(MODELS)]))


def _entry(position: int, model_id: str, server: str) -> dict[str, Any]:
    run = {
        "type": "model_run",
        "method": "POST",
        "server": server,
        "api_path": f"/api/v3/{model_id}",
        "request_schema": request_form(),
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
