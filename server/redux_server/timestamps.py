"""Times in requests: RFC 3339 texts, and where clients send them milliseconds since 1970."""

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

A_TIME = 'a time such as "2026-11-22T14:40:00Z"'
A_TIME_OR_MS = A_TIME + " or milliseconds since 1970"


def _parse(value: Any) -> datetime:
    if not isinstance(value, str):
        raise ValueError("not a text")
    moment = datetime.fromisoformat(value)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


Moment = Annotated[
    datetime, BeforeValidator(_parse), WithJsonSchema({"type": "string", "format": "date-time"})
]


def _parse_ms(value: Any) -> datetime:
    """The hosted documentation has milliseconds in a text; clients send numbers and dates too."""
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        return _parse(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("not a time")
    try:
        return datetime.fromtimestamp(int(value) / 1000, UTC)
    except (OverflowError, OSError):
        raise ValueError("out of range") from None


MomentOrMs = Annotated[
    datetime, BeforeValidator(_parse_ms), WithJsonSchema({"type": ["string", "integer"]})
]


def seconds(moment: datetime | None) -> float | None:
    """Unix seconds."""
    return None if moment is None else moment.timestamp()
