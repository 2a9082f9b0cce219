"""The OpenAPI document, and what it says of the answers of several routes.

Models here describe; they validate nothing. What one route alone has stands beside that route.
Descriptions are those of the hosted service's documentation, where it has the field.
"""

import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field

RESULT_PATHS = (
    "/api/v3/predictions/{task_id}/result",
    "/api/v3/predictions/{task_id}",
    "/api/v2/predictions/{task_id}/result",
    "/api/v2/wavespeed-ai/flux/{task_id}/result",
)
_ID = "45b392b22c3b449fa935bd4dc2219dfe"
# An apple of 32 x 32 pixels, drawn for this document, so that the example needs no network.
_APPLE = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgAgMAAAAOFJJnAAAADFBMVEX////WMDEnjEaWHijc"
    "4vv+AAAAWklEQVR42mNgwAuYX62CMxpwMMShaljDrwaAGaKhoSEgmjEUCByQGawBQDmQIlEH"
    "VogiOCMUxAgFMUBqwAwwIJIB0gMxEMYAGQe2C9MZcBeCFEHczCAagjUAAKjGK2o5PwCSAAAA"
    "AElFTkSuQmCC"
)
SUBMIT_EXAMPLE = {
    "image": _APPLE,
    "prompt": "",
    "size": "512*512",
    "seed": 0,
    "num_inference_steps": 28,
    "guidance_scale": 3.5,
    "num_images": 1,
}
DELETE_EXAMPLE = {"ids": ["45b392b22c3b449fa935bd4dc2219dfe"]}
LIST_EXAMPLE = {"page": 1, "page_size": 20}
WEBHOOK_PARAMETER = {
    "name": "webhook",
    "in": "query",
    "required": False,
    "schema": {"type": "string", "format": "uri"},
    "description": "An https URL that is told when the task has ended: completed or failed. It is "
    "sent the prediction object by POST, signed, and up to 11 times until it answers 2xx.",
}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "description": "Any text of your own, such as a UUID. A second request with it is answered "
    "with the task that the first one made (and the header `Idempotent-Replayed: true`); with "
    "other parameters it is refused. Kept for a day.",
}
_ERRORS = {
    400: "A parameter cannot be used",
    401: "No API key, or not one of ours",
    404: "No such task for this key, or no such upload",
    408: "The body did not come in time",
    409: "The Idempotency-Key was used for another request, or its task was deleted; or another "
    "file was sent to this upload URL before",
    410: "Its time is over, or it was deleted",
    413: "The body is too large",
    429: "The queue is full, or this key has used up its share; see Retry-After",
    503: "The database cannot be used right now",
}


class Urls(BaseModel):
    """Related API endpoints."""

    get: str = Field(
        description="URL to retrieve the prediction result",
        examples=[f"http://127.0.0.1:8000/api/v3/predictions/{_ID}/result"],
    )


class Progress(BaseModel):
    """How far the task is."""

    step: int = Field(description="Denoising steps done, over all images")
    total_steps: int = Field(description="Denoising steps in all")
    queue_position: int | None = Field(
        None,
        description="Only while the task waits: about how many tasks will be begun before it, if "
        "none ends or comes meanwhile; 0 is next. Beyond 1,000 tasks of one key, at least so many",
    )
    waiting_for: str | None = Field(
        None,
        description="Only while the task waits for more than its turn: for what, such as a worker, "
        "where none is ready or those that are run something else than it was accepted for",
    )


class Prediction(BaseModel):
    """A task, in the shape every known client reads."""

    id: str = Field(description="Unique identifier for the prediction, Task Id", examples=[_ID])
    model: str = Field(description="Model ID used for the prediction")
    input: dict[str, Any] = Field(description="The parameters, defaults filled in")
    outputs: list[str] = Field(
        description="URLs of the generated images (empty when status is not completed), or the "
        "images in base64 if that was asked for",
        examples=[["http://127.0.0.1:8000/files/052f1b9e.../1796577541/45b392b2.../1/0.png"]],
    )
    urls: Urls
    has_nsfw_contents: list[bool] = Field(
        description="NSFW detection for each output; a detected image is replaced by a black one",
        examples=[[False]],
    )
    seeds: list[int] = Field(description="The seed of each output", examples=[[0]])
    quality: str = Field(
        description="The tier that made the images (empty before)", examples=["exact"]
    )
    reused_steps: int = Field(
        description="Denoising steps, over all images, at which the step cache spared computation"
    )
    status: str = Field(
        description="created, processing, completed, failed or cancelled", examples=["completed"]
    )
    progress: Progress
    created_at: str = Field(
        description="ISO timestamp of when the request was created",
        examples=["2026-04-01T12:34:56.789Z"],
    )
    error: str = Field(description="Error message (empty if no error occurred)")
    code: int = Field(
        description="0, or why the task failed: 1402 image not usable, 5000 internal; "
        "5004 while it goes on: sync mode timed out"
    )
    executionTime: int = Field(description="Inference time in milliseconds")  # noqa: N815
    timings: dict[str, int] = Field(
        description="Milliseconds by stage; `inference` is the time on the device",
        examples=[{"inference": 3100, "fetch": 140, "denoise": 2950, "decode": 120}],
    )


class Success(BaseModel):
    """What every good answer has around its ``data``."""

    code: int = Field(200, description="HTTP status code (e.g., 200 for success)")
    message: str = Field("success", description="Status message (e.g., “success”)")


class Envelope(Success):
    """What every answer with status 200 looks like."""

    data: Prediction


class Secret(BaseModel):
    """What signs webhooks."""

    secret: str = Field(
        description="The key of the HMAC is the text after `whsec_`, not decoded (signatures v3); "
        "decoded from base64 for Standard Webhooks (v1)",
        examples=["whsec_5WbX5kEWLlfzsGNjH64I8lOOqUB6e8FH"],
    )


class SecretEnvelope(Success):
    """What the answer with the secret looks like."""

    data: Secret


class Deleted(BaseModel):
    """What came of deleting."""

    deleted_count: int = Field(description="How many of the tasks there were, and are no more")


class DeletedEnvelope(Success):
    """The answer to a delete."""

    data: Deleted


class ErrorBody(BaseModel):
    """What every other answer looks like."""

    code: int = Field(description="The HTTP status")
    message: str = Field(description="What was given, what is allowed, what to do")
    error: str = Field(description="The message again, for clients that look here")
    error_code: str = Field(examples=["invalid_parameter"])
    data: None = None


class WorkerReport(BaseModel):
    """One worker."""

    device: str = Field(examples=["cuda:0"])
    state: str = Field(description="loading, ready, failed or gone", examples=["ready"])
    detail: str = Field(description="What it runs, or why it does not")
    model: str = Field(description="The model it runs; empty unless it is ready", examples=["mini"])
    fingerprint: str = Field(
        description="The weights it runs and its version; tasks accepted for others wait",
        examples=["3f9a2c7d1e0b/0.1.0"],
    )


class Readiness(BaseModel):
    """Whether tasks are being worked on."""

    status: str = Field(description="ready or not ready", examples=["ready"])
    workers: list[WorkerReport]


def responses(
    *errors: int, model: type[BaseModel] = Envelope, description: str = "The task"
) -> dict[int | str, dict[str, Any]]:
    """The documented answers of a path: 200 with ``model``, and these ``errors``."""
    documented: dict[int | str, dict[str, Any]] = {
        200: {"model": model, "description": description}
    }
    for status in errors:
        documented[status] = {"model": ErrorBody, "description": _ERRORS[status]}
    return documented


def json_body(model: type[BaseModel], example: Mapping[str, Any]) -> dict[str, Any]:
    """A documented JSON body, with an example that is answered with 200 as it stands."""
    content = {"schema": model.model_json_schema(), "example": example}
    return {"required": True, "content": {"application/json": content}}


def _result_operation(path: str) -> dict[str, Any]:
    """What a poll takes and gives."""

    def answer(schema: str, description: str) -> dict[str, Any]:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
        return {"description": description, "content": content}

    task_id = {"name": "task_id", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "tags": ["predictions"],
        "summary": "Get the result",
        "description": "The state of a task, and its outputs once it is completed.",
        "operationId": "get" + re.sub(r"\W+", "_", path.replace("{task_id}", "")).rstrip("_"),
        "parameters": [task_id],
        "responses": {
            "200": answer("Envelope", "The task"),
            **{str(code): answer("ErrorBody", _ERRORS[code]) for code in (401, 404, 410, 503)},
        },
    }


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of ``app``, with bearer keys on everything under ``/api/``."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=app.description,
            routes=app.routes,
        )
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["key"] = {"type": "http", "scheme": "bearer"}
        results = {path: {"get": _result_operation(path)} for path in RESULT_PATHS}
        for path, operations in results.items():
            operations.update(document["paths"].pop(path, {}))
        document["paths"] = {**results, **document["paths"]}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # never given: ours are 400
                if path.startswith("/api/"):
                    operation["security"] = [{"key": []}]
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"].get("schemas", {}).pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema
