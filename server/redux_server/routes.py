"""The task API: submit, poll, download. Paths are those of the hosted service."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from redux_server import metrics
from redux_server.admission import (
    check_disk,
    check_draining,
    check_places,
    check_quality,
    check_rate,
    idempotency_key,
    refusal,
)
from redux_server.base64_output import base64_answer
from redux_server.database import DATABASE_AWAY
from redux_server.downloads import download_response
from redux_server.errors import (
    BadRequest,
    NotFound,
    Unavailable,
    no_database,
)
from redux_server.input_pictures import (
    forget_pictures,
    has_inline_pictures,
    sent_pictures,
    store_pictures,
)
from redux_server.openapi import (
    IDEMPOTENCY_KEY,
    RESULT_PATHS,
    WEBHOOK_PARAMETER,
    SecretEnvelope,
    responses,
)
from redux_server.own_urls import check_own_url
from redux_server.places import Refusal
from redux_server.schemas import (
    MODELS,
    PredictionRequest,
    complaint,
    envelope,
    parse_request,
)
from redux_server.services import Services
from redux_server.tasks import TASK_ID, Acceptance, Created, NewTask, Replayed, Task
from redux_server.webhook_url import NO_BASE64, one_webhook

router = APIRouter()
catch_all = APIRouter()  # to be included last: its path takes any
_log = structlog.get_logger("redux_server.routes")


# A plain function here would cost every request a trip through a thread pool.
async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Parts = Annotated[Services, Depends(_services)]


async def result(request: Request) -> Response:
    """The state of a task, and its outputs once it is completed."""
    parts = await _services(request)
    task = await find_mine(request.path_params["task_id"], request, parts)
    return await full_answer(task, request, parts, queue_position=await parts.queue.of(task))


async def find_mine(task_id: str, request: Request, parts: Services) -> Task:
    """The task of that id, if it is the caller's.

    Raises:
        NotFound: it is not, or there is none.
        Unavailable: the database does not answer.
    """
    task = await _find(task_id, parts) if TASK_ID.fullmatch(task_id) else None
    # Another key's task looks like one that never was: ids must not be confirmed by guessing.
    if task is None or task.key_id != request.state.key_id:
        raise no_task(task_id)
    return task


def no_task(task_id: str) -> NotFound:
    """What to raise for an id that is unknown, or another key's."""
    return NotFound(f"No task {task_id[:64]!r} for this key; results are kept for a limited time.")


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
        "responses": responses(400, 401, 404, 408, 409, 410, 413, 429, 503),
        "openapi_extra": {
            "parameters": [WEBHOOK_PARAMETER, IDEMPOTENCY_KEY],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": PredictionRequest.model_json_schema()}},
            },
        },
    }


async def submit(request: Request, parts: Parts) -> Response:
    """Accept a task durably and answer, unless told to wait; its picture is fetched afterwards."""
    check_draining(parts)
    check_rate(request.state.key_id, parts)
    check_disk(parts)
    repeat_key = idempotency_key(request)
    await check_places(request, repeat_key, parts)
    wanted, webhook = await _read_body(request)
    bases = (str(request.base_url), parts.settings.public_url)
    for name, sent in sent_pictures(wanted):
        check_own_url(sent, parts.signer, bases, name=name)
    check_quality(wanted.quality, parts.settings.backend)
    model = request.url.path.split("/", 3)[3]
    new = NewTask(
        key_id=request.state.key_id,
        model=model,
        input=wanted.parameters(),
        request_id=request.state.request_id,
        webhook_url=parts.webhooks.register(webhook, str(request.base_url)) if webhook else None,
        shape=wanted.shape,
        idempotency_key=repeat_key,
        digest=await asyncio.to_thread(wanted.digest, model, webhook) if repeat_key else "",
    )
    acceptance = await _accept(new, wanted, parts)
    headers = None
    if isinstance(acceptance, Replayed):
        headers = {"Idempotent-Replayed": "true"}
    else:
        parts.engine.wake()
    if wanted.enable_sync_mode:
        return await _held_answer(acceptance.task, request, parts, headers)
    return await full_answer(acceptance.task, request, parts, headers)


for _version in ("v2", "v3"):
    for _model in MODELS:
        router.post(**_submit_operation(_version, _model))(submit)


@router.get(
    "/api/v3/webhook/secret",
    tags=["webhooks"],
    summary="Get the webhook secret",
    operation_id="get_webhook_secret",
    responses=responses(401, 503, model=SecretEnvelope, description="The secret"),
)
async def webhook_secret(request: Request, parts: Parts) -> JSONResponse:
    """The secret that signs the webhooks of this key; made when it is first asked for."""
    try:
        secret = await asyncio.to_thread(parts.webhooks.secret, request.state.key_id)
    except DATABASE_AWAY:
        raise no_database() from None
    return JSONResponse(envelope({"secret": secret}), headers={"Cache-Control": "no-store"})


@router.api_route("/files/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
async def download(request: Request, path: str, parts: Parts) -> Response:
    """A stored picture; the signed path is the permission."""
    key = parts.signer.open_key(f"/files/{path}")
    return await download_response(request, parts.blobs, key)


@catch_all.post("/api/{version}/{path:path}", include_in_schema=False)
async def unknown_model(version: str, path: str) -> Response:
    """Say which models there are."""
    raise NotFound(f"No model {path[:100]!r} here; available are {', '.join(MODELS)}.")


async def read_json(request: Request, example: str) -> Any:
    """The body, decoded; ``example`` is shown to whoever sends none."""
    try:
        return await request.json()
    except (ValueError, RecursionError):
        raise BadRequest(
            f"The body is not valid JSON; send an object such as {example} "
            "with Content-Type: application/json."
        ) from None


async def _read_body(request: Request) -> tuple[PredictionRequest, str]:
    """The parameters, and the URL to tell of the end (or ``""``)."""
    body = await read_json(request, '{"image": "https://example.com/photo.jpg"}')
    try:
        wanted = parse_request(body)
    except ValidationError as error:
        raise BadRequest(complaint(error.errors(include_url=False))) from None
    in_query = request.query_params.getlist("webhook")
    webhook = one_webhook([*in_query, wanted.webhook, wanted.webhook_url])
    if webhook and wanted.enable_base64_output:
        raise BadRequest(NO_BASE64)
    return wanted, webhook


async def _accept(new: NewTask, wanted: PredictionRequest, parts: Services) -> Created | Replayed:
    """Store the task and its pictures; nothing is left of one that was not created."""
    async with _place(new, wanted, parts) as refused:
        # After looking for a place, which the first request with the key may have taken meanwhile.
        acceptance = await _recall(new, parts) if new.idempotency_key else None
        acceptance = acceptance or refused or await _store(new, wanted, parts)
    if isinstance(acceptance, Created):
        metrics.ACCEPTED.inc()
    if isinstance(acceptance, Created | Replayed):
        return acceptance
    raise refusal(acceptance, parts)


@asynccontextmanager
async def _place(
    new: NewTask, wanted: PredictionRequest, parts: Services
) -> AsyncIterator[Refusal | None]:
    """A place in the queue for the time that storing takes, or why there is none."""
    if not has_inline_pictures(wanted):  # to ask for one costs as much as to be refused
        yield None
        return
    async with AsyncExitStack() as held:
        try:
            refused = await held.enter_async_context(parts.places.hold(new.key_id))
        except DATABASE_AWAY:
            raise no_database() from None
        yield refused


async def _store(new: NewTask, wanted: PredictionRequest, parts: Services) -> Acceptance:
    new.input.update(await store_pictures(wanted, new.id, parts.blobs))
    try:
        acceptance = await parts.accept(new)
    except DATABASE_AWAY as error:
        raise await _not_stored(new, error, parts) from None
    if not isinstance(acceptance, Created):
        await forget_pictures(new.input, new.id, parts.blobs)
    return acceptance


async def _not_stored(new: NewTask, error: Exception, parts: Services) -> Unavailable:
    """What to say of a task that the database did not take, or may have taken."""
    metrics.REJECTED.labels("database").inc()
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        text = (  # then it needs its picture
            "The database went away while the task was being stored, so it may have been accepted; "
            "with an Idempotency-Key a repeated request makes no second one."
        )
    else:
        await forget_pictures(new.input, new.id, parts.blobs)
        text = "The task could not be stored (database busy, or disk full); nothing was started."
    return Unavailable(text, headers={"Retry-After": "5"})


async def _recall(new: NewTask, parts: Services) -> Acceptance | None:
    """Look before a picture is stored: a replay must not store it again."""
    try:
        return await asyncio.to_thread(parts.store.recall, new)
    except DATABASE_AWAY:
        raise no_database() from None


async def _find(task_id: str, parts: Services) -> Task | None:
    try:
        return await parts.find(task_id)
    except DATABASE_AWAY:
        raise no_database() from None


def answer(
    task: Task,
    request: Request,
    parts: Services,
    headers: Mapping[str, str] | None = None,
    *,
    queue_position: int | None = None,
) -> JSONResponse:
    """A task in the shape every client reads, with ``headers`` besides."""
    data = parts.present(task, str(request.base_url), queue_position=queue_position)
    return JSONResponse(envelope(data), headers=headers)


async def full_answer(
    task: Task,
    request: Request,
    parts: Services,
    headers: Mapping[str, str] | None = None,
    *,
    queue_position: int | None = None,
) -> Response:
    """``answer``, with the images themselves in it if that was asked for."""
    keys = task.outcome.outputs if task.outcome else []
    if not keys or not task.input.get("enable_base64_output"):
        return answer(task, request, parts, headers, queue_position=queue_position)
    body = envelope(parts.present(task, str(request.base_url)))
    return await base64_answer(body, keys, parts.blobs, headers)


async def _held_answer(
    task: Task, request: Request, parts: Services, headers: Mapping[str, str] | None
) -> Response:
    """The answer once the task has ended; too early, it says so, and where to ask again."""
    held = await parts.sync_mode.hold(task, lambda: _leaves(request))
    if held.task is None:
        raise no_task(task.id)
    if not held.too_early:
        return await full_answer(held.task, request, parts, headers)
    data = held.explain(parts.present(held.task, str(request.base_url)))
    return JSONResponse(envelope(data), headers=headers)


async def _leaves(request: Request) -> None:
    """Return when the client has closed its connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
