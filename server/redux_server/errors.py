"""Errors of the HTTP API and the one body they all have.

```
ApiError             status and message, in the contract's shape
├── BadRequest       400  a parameter that cannot be used
├── Unauthorized     401  no key, or a wrong one
├── NotFound         404  unknown path, model, task or file
├── Gone             410  a file that was deleted after its time
├── TooLarge         413  a body over the limit
├── QueueFull        429  try again later
└── Unavailable      503  the database cannot be used right now
```
"""

from collections.abc import Mapping

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


class Gone(ApiError):
    """It was here, and its time is over."""

    status, name = 410, "expired"


class TooLarge(ApiError):
    """More bytes than we take."""

    status, name = 413, "too_large"


class QueueFull(ApiError):
    """No room for another task right now."""

    status, name = 429, "queue_full"


class Unavailable(ApiError):
    """Something we depend on does not answer."""

    status, name = 503, "unavailable"


def error_response(
    status: int, message: str, name: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The body every client can read: some look at ``message``, some at ``error``."""
    body = {"code": status, "message": message, "error": message, "error_code": name, "data": None}
    return JSONResponse(body, status_code=status, headers=dict(headers or {}))
