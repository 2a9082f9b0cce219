"""What the hosted service knows of money: here everything costs nothing, and that is what is said.

Clients test a key with the balance, quote a price before a run, and look up what a task has cost.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from redux_server.account_shapes import (
    ALLOWED,
    ALLOWED_OF_BILLINGS,
    CURRENCY,
    BalanceEnvelope,
    BillingsEnvelope,
    BillingsRequest,
    PriceEnvelope,
    PriceRequest,
    UsageEnvelope,
    UsageRequest,
)
from redux_server.database import DATABASE_AWAY
from redux_server.errors import BadRequest, NotFound, no_database
from redux_server.listing import DayCount, Wanted
from redux_server.model_routes import KIND
from redux_server.openapi import responses
from redux_server.routes import Parts, read_json
from redux_server.schemas import MODELS, complaint, envelope, timestamp
from redux_server.tasks import TASK_ID, Status, Task
from redux_server.timestamps import seconds

BALANCE = 0.0
LONGEST = timedelta(days=31)
M = TypeVar("M", bound=BaseModel)

router = APIRouter(tags=["account"])


def _documented(model: type[BaseModel], answer: type[BaseModel], *errors: int) -> dict[str, Any]:
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {
        "responses": responses(400, 401, 408, 413, *errors, model=answer, description="The answer"),
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
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
async def billings(request: Request, parts: Parts) -> JSONResponse:
    """A record of price 0 for each task of this key, for clients that look up what one has cost."""
    asked = await _read(request, BillingsRequest, '{"page": 1, "page_size": 10}')
    wanted = _billed(asked, request.state.key_id)
    found: list[Task] = []
    total = 0
    if wanted is not None:
        is_upwards = asked.sort.strip().upper().endswith("ASC")
        try:
            total = await asyncio.to_thread(parts.history.count, wanted)
            found = await asyncio.to_thread(
                parts.history.page,
                wanted,
                number=asked.page,
                size=asked.page_size,
                oldest_first=is_upwards,
            )
        except DATABASE_AWAY:
            raise no_database() from None
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
async def usage(request: Request, parts: Parts) -> JSONResponse:
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
        try:
            counts = await asyncio.to_thread(
                parts.history.count_by_day, wanted, first=first, end=end
            )
        except DATABASE_AWAY:
            raise no_database() from None
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
