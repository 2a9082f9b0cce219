"""The task API: submit, poll, download. Paths are those of the hosted service."""

import asyncio
import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from obstore.exceptions import BaseError as BlobError
from pydantic import ValidationError
from sqlalchemy.exc import OperationalError

from redux_server import inline_image, metrics
from redux_server.errors import BadRequest, NotFound, QueueFull, Unavailable
from redux_server.openapi import RESULT_PATHS, responses
from redux_server.schemas import (
    MODELS,
    PredictionRequest,
    complaint,
    envelope,
    parse_request,
    prediction,
)
from redux_server.services import Services
from redux_server.tasks import TASK_ID, NewTask, Task

MAX_URL = 8192

router = APIRouter()


# A plain function here would cost every request a trip through a thread pool.
async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Parts = Annotated[Services, Depends(_services)]


async def result(request: Request) -> JSONResponse:
    """The state of a task, and its outputs once it is completed."""
    parts = await _services(request)
    task_id = request.path_params["task_id"]
    task = await _find(task_id, parts) if TASK_ID.fullmatch(task_id) else None
    # Another key's task looks like one that never was: ids must not be confirmed by guessing.
    if task is None or task.key_id != request.state.key_id:
        raise NotFound(
            f"No task {task_id[:64]!r} for this key; results are kept for a limited time."
        )
    return _answer(task, request, parts)


# Polls are most of the traffic. Routes are tried in order, so theirs come first; and they are
# Starlette's plain routes, which need a third less time than FastAPI's (openapi.py describes them).
for _path in RESULT_PATHS:
    router.add_route(_path, result, methods=["GET"])


def _submit_operation(version: str, model: str) -> dict[str, Any]:
    """Document a submit path; validation is ours, so that errors have the contract's shape."""
    return {
        "path": f"/api/{version}/{model}",
        "tags": ["predictions"],
        "summary": "Submit a task",
        "operation_id": f"submit_{version}_{model.split('/')[1].replace('-', '_')}",
        "include_in_schema": model == MODELS[0],
        "responses": responses(400, 401, 413, 429, 503),
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": PredictionRequest.model_json_schema()}},
            }
        },
    }


async def submit(request: Request, parts: Parts) -> JSONResponse:
    """Accept a task durably and answer at once; its picture is fetched afterwards."""
    wanted = await _read_body(request)
    new = NewTask(
        key_id=request.state.key_id,
        model=request.url.path.split("/", 3)[3],
        input=wanted.parameters(),
        request_id=request.state.request_id,
    )
    new.input["image"] = await _store_image(wanted.image, new.id, parts)
    task = await _accept(new, parts)
    parts.engine.wake()
    return _answer(task, request, parts)


for _version in ("v2", "v3"):
    for _model in MODELS:
        router.post(**_submit_operation(_version, _model))(submit)


@router.api_route("/files/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
async def download(path: str, parts: Parts) -> Response:
    """A stored picture; the signed path is the permission."""
    key = parts.signer.open_key(f"/files/{path}")
    try:
        data = await asyncio.to_thread(parts.blobs.get, key)
    except FileNotFoundError:
        raise NotFound("This file was deleted.") from None
    kind = inline_image.media_type(data)
    return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})


@router.post("/api/{version}/{path:path}", include_in_schema=False)
async def unknown_model(version: str, path: str) -> Response:
    """Say which models there are."""
    raise NotFound(f"No model {path[:100]!r} here; available are {', '.join(MODELS)}.")


async def _read_body(request: Request) -> PredictionRequest:
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        raise BadRequest(
            "The body is not valid JSON; send an object such as "
            '{"image": "https://example.com/photo.jpg"} with Content-Type: application/json.'
        ) from None
    try:
        return parse_request(body)
    except ValidationError as error:
        raise BadRequest(complaint(error.errors(include_url=False))) from None


async def _store_image(image: str, task_id: str, parts: Services) -> str:
    """What to note as the task's image: its URL, or where an inline picture was put."""
    if re.match(r"https?:", image, re.IGNORECASE):
        _check_url(image)
        return image
    data = await asyncio.to_thread(inline_image.decode, image)
    key = f"{task_id}/input"
    try:
        await asyncio.to_thread(parts.blobs.put, key, data)
    except (OSError, BlobError):
        metrics.REJECTED.labels("blobs").inc()
        raise Unavailable(
            "The picture could not be stored (disk full?); nothing was started.",
            headers={"Retry-After": "5"},
        ) from None
    return f"blob:{key}"


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and len(url) <= MAX_URL and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or any(character.isspace() for character in url):
        raise BadRequest(f"image must be a complete http(s) URL; got {url[:80]!r}.")


async def _accept(new: NewTask, parts: Services) -> Task:
    try:
        task = await parts.accept(new)
    except OperationalError:
        await asyncio.to_thread(parts.blobs.delete_under, new.id)
        metrics.REJECTED.labels("database").inc()
        raise Unavailable(
            "The task could not be stored (database busy, or disk full); nothing was started.",
            headers={"Retry-After": "5"},
        ) from None
    if task is None:
        await asyncio.to_thread(parts.blobs.delete_under, new.id)
        metrics.REJECTED.labels("queue_full").inc()
        raise QueueFull(
            f"The queue is full ({parts.settings.max_queue} open tasks); try again shortly.",
            headers={"Retry-After": "5"},
        )
    metrics.ACCEPTED.inc()
    return task


async def _find(task_id: str, parts: Services) -> Task | None:
    try:
        return await parts.find(task_id)
    except OperationalError:
        raise Unavailable("The database does not answer.", headers={"Retry-After": "2"}) from None


def _answer(task: Task, request: Request, parts: Services) -> JSONResponse:
    base_url = parts.settings.public_url or str(request.base_url)
    kept_s = parts.settings.retention_hours * 3600
    data = prediction(
        task,
        base_url=base_url.rstrip("/"),
        sign=lambda key, ended: parts.signer.path(key, ended + kept_s),
    )
    return JSONResponse(envelope(data))
