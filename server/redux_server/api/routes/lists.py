"""The list of a key's tasks, and how requests give times.

Times are RFC 3339 texts, and where clients send them also milliseconds since 1970.
"""

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from redux_server.api.dependencies import ServicesDep, read_json
from redux_server.api.openapi import LIST_EXAMPLE, Prediction, Success, json_body, responses
from redux_server.api.prediction import envelope
from redux_server.errors import BadRequest
from redux_server.parameters import MODELS, Whole, complaint
from redux_server.tasks.listing import Wanted
from redux_server.tasks.task import Status, Task

A_TIME = 'a time such as "2026-11-22T14:40:00Z"'
A_TIME_OR_MS = A_TIME + " or milliseconds since 1970"
MAX_PAGE_SIZE = 100
MAX_PAGE = 10**9
STATUSES = (*Status, "timeout")  # no task of ours is ever in the last, and clients ask for it
ALLOWED: Final = {
    "page": f"an integer from 1 to {MAX_PAGE}",
    "page_size": f"an integer from 1 to {MAX_PAGE_SIZE}",
    "model": "a text",
    "status": "one of " + ", ".join(STATUSES),
    "created_after": A_TIME,
    "created_before": A_TIME,
}
router = APIRouter(tags=["predictions"])


def _parse_time(value: Any) -> datetime:
    if not isinstance(value, str):
        raise ValueError("not a text")
    moment = datetime.fromisoformat(value)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


Moment = Annotated[
    datetime,
    BeforeValidator(_parse_time),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]


def _parse_time_or_ms(value: Any) -> datetime:
    """The hosted documentation has milliseconds in a text; clients send numbers and dates too."""
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        return _parse_time(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("not a time")
    try:
        return datetime.fromtimestamp(int(value) / 1000, UTC)
    except (OverflowError, OSError):
        raise ValueError("out of range") from None


MomentOrMs = Annotated[
    datetime, BeforeValidator(_parse_time_or_ms), WithJsonSchema({"type": ["string", "integer"]})
]


def seconds(moment: datetime | None) -> float | None:
    """Unix seconds."""
    return None if moment is None else moment.timestamp()


class ListRequest(BaseModel):
    """Which tasks to list. Unknown fields are ignored; null means absent."""

    model_config = ConfigDict(strict=True, extra="ignore")

    page: Whole = Field(ge=1, le=MAX_PAGE, description="The page to return, from 1")
    page_size: Whole = Field(ge=1, le=MAX_PAGE_SIZE, description="How many tasks a page has")
    model: str = Field("", description="Only tasks of this model (as it was called)")
    status: str = Field(
        "",
        pattern="^(" + "|".join(("", *STATUSES)) + ")$",
        description="Only tasks that are " + ", ".join(STATUSES),
        examples=["completed"],
    )
    created_after: Moment | None = Field(None, description="Only tasks of this time or later")
    created_before: Moment | None = Field(
        None, description="Only tasks before this time; given, pages do not shift as tasks come"
    )


class Listed(BaseModel):
    """A page of tasks."""

    page: int
    items: list[Prediction] = Field(description="Newest first")


class ListedEnvelope(Success):
    """The answer with a page of tasks."""

    data: Listed


@router.post(
    "/api/v3/predictions",
    summary="List tasks",
    description="The tasks of this API key, newest first, as long as they are kept.",
    responses=responses(400, 401, 408, 413, 503, model=ListedEnvelope, description="A page"),
    openapi_extra={"requestBody": json_body(ListRequest, LIST_EXAMPLE)},
)
async def list_tasks(request: Request, services: ServicesDep) -> JSONResponse:
    """A page of what this key has submitted."""
    asked = _parse_request(await read_json(request, '{"page": 1, "page_size": 20}'))
    wanted = _wanted(asked, request.state.key_id)
    found: list[Task] = []
    if wanted is not None:
        found = await asyncio.to_thread(
            services.history.page, wanted, number=asked.page, size=asked.page_size
        )
    items = [services.present(task, str(request.base_url)) for task in found]
    return JSONResponse(envelope({"page": asked.page, "items": items}))


def _parse_request(body: Any) -> ListRequest:
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if value is not None}
    try:
        return ListRequest.model_validate(body)
    except ValidationError as error:
        raise BadRequest(complaint(error.errors(include_url=False), ALLOWED)) from None


def _wanted(asked: ListRequest, key_id: str) -> Wanted | None:
    """What to look for; None where there can be nothing."""
    if asked.model not in ("", *MODELS) or asked.status == "timeout":
        return None
    return Wanted(
        key_id,
        model=asked.model or None,
        status=Status(asked.status) if asked.status else None,
        after=seconds(asked.created_after),
        before=seconds(asked.created_before),
    )
