"""Questions about money and use, and the shapes of their answers. Holds no logic."""

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from redux_server.extensions import Whole
from redux_server.list_routes import MAX_PAGE, MAX_PAGE_SIZE
from redux_server.openapi import Success
from redux_server.schemas import MODELS
from redux_server.timestamps import A_TIME, A_TIME_OR_MS, Moment, MomentOrMs

CURRENCY = "USD"
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
