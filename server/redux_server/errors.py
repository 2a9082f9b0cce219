"""Errors of the HTTP API and the one body they all have.

```
ApiError             status and message, in the contract's shape
├── BadRequest       400  a parameter that cannot be used
├── Unauthorized     401  no key, or a wrong one
├── NotFound         404  unknown path, model, task or file
├── TooSlow          408  a body that does not come
├── Conflict         409  an idempotency key that was used for something else
├── Gone             410  a file that was deleted after its time
├── TooLarge         413  a body over the limit
├── UnsupportedCoding 415  a body in a coding that is not read
├── QueueFull        429  no room for another task, of this key or of anyone
├── StorageFull      429  no room on the disk for another task of this key
├── TooManyRequests  429  a key that submits faster than it may
└── Unavailable      503  something we need is away, or the disk nearly full
```
"""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An error with an HTTP status; its text is shown to the client."""

    status = 500
    name = "internal_error"

    def __init__(self, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.headers = dict(headers or {})


class BadRequest(ApiError):
    """A parameter that cannot be used: which, what was given, what is allowed."""

    status, name = 400, "invalid_parameter"


class Unauthorized(ApiError):
    """No API key, or not one of ours."""

    status, name = 401, "invalid_api_key"


class NotFound(ApiError):
    """Nothing here for this caller."""

    status, name = 404, "not_found"


class TooSlow(ApiError):
    """A request whose body does not arrive."""

    status, name = 408, "too_slow"


class Conflict(ApiError):
    """An idempotency key that stands for another request."""

    status, name = 409, "idempotency_conflict"


class Gone(ApiError):
    """It was here, and its time is over."""

    status, name = 410, "expired"


class TooLarge(ApiError):
    """More bytes than we take."""

    status, name = 413, "too_large"


class UnsupportedCoding(ApiError):
    """A body that is compressed in a way that is not read."""

    status, name = 415, "unsupported_coding"


class QueueFull(ApiError):
    """No room for another task right now."""

    status, name = 429, "queue_full"


class StorageFull(ApiError):
    """A key's tasks store as much as they may."""

    status, name = 429, "storage_full"


class TooManyRequests(ApiError):
    """A key has used up its submits for now."""

    status, name = 429, "rate_limited"


class Unavailable(ApiError):
    """Something we depend on does not answer, or has no room."""

    status, name = 503, "unavailable"


def no_database() -> Unavailable:
    """What is said when a read, or a change that may be repeated, got no answer."""
    return Unavailable("The database does not answer.", headers={"Retry-After": "2"})


def wrong_tables() -> Unavailable:
    """What is said where the database has other tables than we need; its log tells the operator."""
    return Unavailable(
        "The server's database has tables of another version; its operator has to upgrade it.",
        headers={"Retry-After": "60"},
    )


def no_json(example: str) -> BadRequest:
    """What is said of a body that is not JSON."""
    return BadRequest(
        f"The body is not valid JSON; send an object such as {example} "
        "with Content-Type: application/json."
    )


def error_body(status: int, message: str, name: str) -> dict[str, Any]:
    """The body every client can read: some look at ``message``, some at ``error``."""
    return {"code": status, "message": message, "error": message, "error_code": name, "data": None}


def error_response(
    status: int, message: str, name: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An answer with ``error_body``."""
    body = error_body(status, message, name)
    return JSONResponse(body, status_code=status, headers=dict(headers or {}))
