"""What the hosted service knows of money: here everything costs nothing, and that is what is said.

Clients test a key with the balance, quote a price before a run, and look up what a task has cost.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any, Final, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redux_server.api.dependencies import ServicesDep, read_json
from redux_server.api.openapi import Success, json_body, responses
from redux_server.api.prediction import envelope, timestamp
from redux_server.api.routes.lists import (
    A_TIME,
    A_TIME_OR_MS,
    MAX_PAGE,
    MAX_PAGE_SIZE,
    Moment,
    MomentOrMs,
    seconds,
)
from redux_server.api.routes.models import KIND
from redux_server.errors import BadRequest, NotFound
from redux_server.parameters import MODELS, Whole, complaint
from redux_server.tasks.listing import DayCount, Wanted
from redux_server.tasks.task import TASK_ID, Status, Task

CURRENCY = "USD"
BALANCE = 0.0
LONGEST = timedelta(days=31)
MAX_IDS = 100
ALLOWED: Final = {
    "model_id": "the name of a model",
    "inputs": "an object",
    "page": f"an integer from 1 to {MAX_PAGE}",
    "page_size": f"an integer from 1 to {MAX_PAGE_SIZE}",
    "billing_type": "a text",
    "prediction_uuids": f"a list of at most {MAX_IDS} texts",
    "model_uuid": "the name of a model",
    "sort": "a text",
    "start_time": A_TIME,
    "end_time": A_TIME,
}
ALLOWED_OF_BILLINGS: Final = {**ALLOWED, "start_time": A_TIME_OR_MS, "end_time": A_TIME_OR_MS}
M = TypeVar("M", bound=BaseModel)
router = APIRouter(tags=["account"])


class Balance(BaseModel):
    """What is left of the money that nothing is paid with."""

    balance: float = Field(description="Always 0: this server charges nothing", examples=[0.0])


class Price(BaseModel):
    """What a task costs."""

    model_id: str
    price: float = Field(description="Always 0")
    discounted_price: float = Field(description="Always 0")
    discount_rate: float = Field(description="Always 0")
    unit_price: float = Field(description="Always 0; the name that it had before `price`")
    currency: str = Field(examples=[CURRENCY])


class Billings(BaseModel):
    """A page of records, one for each task."""

    page: int
    total: int = Field(description="How many records there are")
    has_more: bool = Field(description="Whether a page follows")
    items: list[dict[str, Any]] = Field(
        description="Each with `uuid` and `prediction.uuid` (the task's id), `billing_type` "
        "deduct, `price` 0, `created_at`, `prediction.model_uuid` and `prediction.status`"
    )


class Usage(BaseModel):
    """How many tasks there were; what they cost is 0."""

    per_model_usage: list[dict[str, Any]]
    daily_usage: list[dict[str, Any]]
    summary: dict[str, float]


class BalanceEnvelope(Success):
    """The answer with the balance."""

    data: Balance


class PriceEnvelope(Success):
    """The answer with a price."""

    data: Price


class BillingsEnvelope(Success):
    """The answer with records."""

    data: Billings


class UsageEnvelope(Success):
    """The answer with the usage."""

    data: Usage


class PriceRequest(BaseModel):
    """Of what the price is asked."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model_id: str = Field(examples=[MODELS[0]])
    inputs: dict[str, Any] = Field(default_factory=dict, description="Its parameters")


class BillingsRequest(BaseModel):
    """Which records to list. Unknown fields are ignored; null means absent."""

    model_config = ConfigDict(strict=True, extra="ignore")

    page: Whole = Field(1, ge=1, le=MAX_PAGE)
    page_size: Whole = Field(10, ge=1, le=MAX_PAGE_SIZE)
    billing_type: str = Field("", description="Only records of this type; all are deduct")
    prediction_uuids: list[str] | None = Field(None, max_length=MAX_IDS)
    model_uuid: str = ""
    sort: str = Field("", description="created_at ASC, or created_at DESC (the default)")
    start_time: MomentOrMs | None = None
    end_time: MomentOrMs | None = None


class UsageRequest(BaseModel):
    """Over which time to count."""

    model_config = ConfigDict(strict=True, extra="ignore")

    start_time: Moment
    end_time: Moment
    model_uuid: str = ""


_EXAMPLES: dict[type[BaseModel], dict[str, Any]] = {
    PriceRequest: {"model_id": MODELS[0], "inputs": {"num_images": 2}},
    BillingsRequest: {"page": 1, "page_size": 10},
    UsageRequest: {"start_time": "2026-11-01T00:00:00Z", "end_time": "2026-12-01T00:00:00Z"},
}


def _documented(model: type[BaseModel], answer: type[BaseModel], *errors: int) -> dict[str, Any]:
    return {
        "responses": responses(400, 401, 408, 413, *errors, model=answer, description="The answer"),
        "openapi_extra": {"requestBody": json_body(model, _EXAMPLES[model])},
    }


@router.get(
    "/api/v3/account/balance",
    summary="Get the balance",
    operation_id="get_account_balance",
    responses=responses(401, 503, model=BalanceEnvelope, description="The balance"),
)
@router.get(
    "/api/v3/balance",
    summary="Get the balance",
    operation_id="get_balance",
    responses=responses(401, 503, model=BalanceEnvelope, description="The balance"),
)
async def balance() -> JSONResponse:
    """0: there is no account. Clients ask to find out whether their key is good."""
    return JSONResponse(envelope({"balance": BALANCE}))


@router.post(
    "/api/v3/model/pricing",
    summary="Get a price",
    operation_id="get_model_pricing",
    **_documented(PriceRequest, PriceEnvelope, 404, 503),
)
@router.post(
    "/api/v3/model/price",
    summary="Get a price",
    operation_id="get_model_price",
    **_documented(PriceRequest, PriceEnvelope, 404, 503),
)
async def price(request: Request) -> JSONResponse:
    """What a task would cost: nothing."""
    asked = await _read(request, PriceRequest, '{"model_id": "wavespeed-ai/flux-pro-redux"}')
    if asked.model_id not in MODELS:
        raise NotFound(f"No model {asked.model_id[:100]!r}; available are {', '.join(MODELS)}.")
    free = dict.fromkeys(("price", "discounted_price", "discount_rate", "unit_price"), 0.0)
    return JSONResponse(envelope({"model_id": asked.model_id, **free, "currency": CURRENCY}))


@router.post(
    "/api/v3/billings/search",
    summary="List what tasks cost",
    operation_id="search_billings",
    **_documented(BillingsRequest, BillingsEnvelope, 503),
)
async def billings(request: Request, services: ServicesDep) -> JSONResponse:
    """A record of price 0 for each task of this key, for clients that look up what one has cost."""
    asked = await _read(request, BillingsRequest, '{"page": 1, "page_size": 10}')
    wanted = _billed(asked, request.state.key_id)
    found: list[Task] = []
    total = 0
    if wanted is not None:
        is_upwards = asked.sort.strip().upper().endswith("ASC")
        total = await asyncio.to_thread(services.history.count, wanted)
        found = await asyncio.to_thread(
            services.history.page,
            wanted,
            number=asked.page,
            size=asked.page_size,
            oldest_first=is_upwards,
        )
    has_more = asked.page * asked.page_size < total
    items = [_record(task) for task in found]
    data = {"page": asked.page, "total": total, "has_more": has_more, "items": items}
    return JSONResponse(envelope(data))


@router.post(
    "/api/v3/user/usage_stats",
    summary="Count tasks by day and model",
    operation_id="get_usage_stats",
    **_documented(UsageRequest, UsageEnvelope, 503),
)
async def usage(request: Request, services: ServicesDep) -> JSONResponse:
    """How many tasks this key has submitted, of those that are still kept."""
    example = '{"start_time": "2026-11-01T00:00:00Z", "end_time": "2026-11-12T00:00:00Z"}'
    asked = await _read(request, UsageRequest, example)
    if not timedelta(0) <= asked.end_time - asked.start_time <= LONGEST:
        raise BadRequest(
            f"end_time must be at most {LONGEST.days} days after start_time, and not before it; "
            f"got {asked.start_time.isoformat()} and {asked.end_time.isoformat()}."
        )
    counts: list[DayCount] = []
    if asked.model_uuid in ("", *MODELS):
        wanted = Wanted(request.state.key_id, model=asked.model_uuid or None)
        first, end = int(asked.start_time.timestamp()), int(asked.end_time.timestamp())
        counts = await asyncio.to_thread(
            services.history.count_by_day, wanted, first=first, end=end
        )
    return JSONResponse(envelope(_statistics(counts)))


async def _read(request: Request, model: type[M], example: str) -> M:
    body = await read_json(request, example)
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if value is not None}
    allowed = ALLOWED_OF_BILLINGS if issubclass(model, BillingsRequest) else ALLOWED
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise BadRequest(complaint(error.errors(include_url=False), allowed)) from None


def _billed(asked: BillingsRequest, key_id: str) -> Wanted | None:
    """Whose records are asked for; None where there can be none."""
    if asked.billing_type not in ("", "deduct") or asked.model_uuid not in ("", *MODELS):
        return None
    ids = asked.prediction_uuids
    return Wanted(
        key_id,
        model=asked.model_uuid or None,
        after=seconds(asked.start_time),
        before=seconds(asked.end_time),
        ids=None if ids is None else tuple(filter(TASK_ID.fullmatch, ids)),
    )


def _record(task: Task) -> dict[str, Any]:
    order = {"uuid": task.id, "state": "done", "price": 0, "origin_price": 0, "status": ""}
    prediction = {"uuid": task.id, "model_uuid": task.model, "status": task.status.value}
    return {
        "uuid": task.id,
        "billing_type": "deduct",
        "price": 0,
        "created_at": timestamp(task.created_at),
        "updated_at": timestamp(task.finished_at or task.created_at),
        "order": order,
        "prediction": prediction,
        "access_key_name": "",
    }


def _statistics(counts: list[DayCount]) -> dict[str, Any]:
    by_model = []
    for model in sorted({each.model for each in counts}):
        days = [each for each in counts if each.model == model]
        by_model.append(
            {
                "model_uuid": model,
                "model_type": KIND,
                "unit_price": 0,
                "total_cost": 0,
                "total_count": sum(each.count for each in days),
                "last_used_date": _date(max(each.day for each in days)),
            }
        )
    summary = {
        "total_cost": 0,
        "total_requests": sum(each.count for each in counts),
        "success_requests": sum(each.count for each in counts if each.status is Status.COMPLETED),
    }
    daily = [_day(day, list(same)) for day, same in groupby(counts, lambda each: each.day)]
    return {"per_model_usage": by_model, "daily_usage": daily, "summary": summary}


def _day(day: int, counts: list[DayCount]) -> dict[str, Any]:
    models = [
        {"model_uuid": model, "amount": 0, "count": sum(each.count for each in same)}
        for model, same in groupby(counts, lambda each: each.model)
    ]
    total = sum(each.count for each in counts)
    return {"date": _date(day), "amount": 0, "count": total, "models": models}


def _date(day: int) -> str:
    return datetime.fromtimestamp(day, UTC).date().isoformat()
