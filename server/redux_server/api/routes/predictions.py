"""Submit and poll: the paths of the hosted service, from a body to a stored task and its answer.

What may refuse a submit is in ``redux_server.api.admission``; workers are only told that there is
something new.
"""

import asyncio
from dataclasses import replace
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from redux_server import metrics
from redux_server.api.admission import (
    check_disk,
    check_draining,
    check_place,
    check_quality,
    check_rate,
    check_workers,
    idempotency_key,
    refusal,
)
from redux_server.api.answers import full_answer, held_answer
from redux_server.api.bodies import Body
from redux_server.api.dependencies import ServicesDep, find_mine, services_of
from redux_server.api.limits import Reservation
from redux_server.api.openapi import (
    IDEMPOTENCY_KEY,
    RESULT_PATHS,
    SUBMIT_EXAMPLE,
    WEBHOOK_PARAMETER,
    SecretEnvelope,
    json_body,
    responses,
)
from redux_server.api.prediction import envelope
from redux_server.api.services import Services
from redux_server.coercion import trimmed
from redux_server.database.connection import DATABASE_AWAY
from redux_server.errors import BadRequest, NotFound, Unavailable
from redux_server.parameters import (
    MIN_SIDE_OF_ALIASES,
    MODELS,
    PredictionRequest,
    complaint,
    parse_request,
    parse_size,
    requests_of,
)
from redux_server.pictures.long_texts import LongTexts
from redux_server.pictures.submitted import (
    check_long_texts,
    check_own_url,
    forget_pictures,
    has_inline_pictures,
    least_picture_bytes,
    sent_pictures,
    store_pictures,
)
from redux_server.tasks.rows import new_bytes
from redux_server.tasks.stored import most_output_bytes
from redux_server.tasks.task import Acceptance, Created, NewTask, Replayed
from redux_server.webhooks.callback import NO_BASE64, one_webhook

NO_WORKERS = "Workers-Ready"  # sent with a submit while there are none
router = APIRouter()
catch_all = APIRouter()  # to be included last: its path takes any


async def result(request: Request) -> Response:
    """The state of a task, and its outputs once it is completed."""
    services = await services_of(request)
    task = await find_mine(request.path_params["task_id"], request, services)
    await services.fleet.now()
    return await full_answer(task, request, services, queue_position=await services.queue.of(task))


# Polls are most of the traffic. Routes are tried in order, so theirs come first; and they are
# Starlette's plain routes, which need a third less time than FastAPI's (openapi.py describes them).
for _path in RESULT_PATHS:
    router.add_route(_path, result, methods=["GET"])


async def submit(request: Request, services: ServicesDep) -> Response:
    """Accept a task durably and answer, unless told to wait; its picture is fetched afterwards."""
    check_draining(services)
    check_rate(request.state.key_id, services)
    check_disk(services)
    fleet = await check_workers(services)
    repeat_key = idempotency_key(request)
    with services.reservations.hold(request.state.key_id) as reservation:
        await check_place(request, repeat_key, reservation, services)
        async with services.bodies.receive(request, request.state.key_id) as body:
            asked = await _read_body(request, body, services)
            new = await _new_task(request, asked, repeat_key, services)
            left = await _left_alone(new, asked, services)
            acceptance = left or await _accept(new, asked, reservation, services)
    headers = {} if fleet.ready else {NO_WORKERS: "0"}
    if isinstance(acceptance, Replayed):
        headers["Idempotent-Replayed"] = "true"
    else:
        services.dispatch.wake()
    if asked.wanted.enable_sync_mode:
        return await held_answer(acceptance.task, request, services, headers, digest=new.digest)
    return await full_answer(acceptance.task, request, services, headers)


class _Asked(NamedTuple):
    """What a body asks for: parameters, whom to tell of the end (or ``""``), texts on the disk."""

    wanted: PredictionRequest
    webhook: str
    texts: LongTexts


async def _read_body(request: Request, body: Body, services: Services) -> _Asked:
    document, texts = await services.bodies.read(body, '{"image": "https://example.com/photo.jpg"}')
    check_long_texts(document, texts)
    model = _model_of(request)
    try:
        wanted = parse_request(document, model)
    except ValidationError as error:
        allowed = requests_of(model).allowed
        raise BadRequest(complaint(error.errors(include_url=False), allowed)) from None
    in_query = [trimmed(url) for url in request.query_params.getlist("webhook")]
    webhook = one_webhook([*in_query, wanted.webhook, wanted.webhook_url])
    if webhook and wanted.enable_base64_output:
        raise BadRequest(NO_BASE64)
    return _Asked(wanted, webhook, texts)


def _model_of(request: Request) -> str:
    """The model that was submitted to: paths end in its name."""
    path: str = request.scope["path"]
    return path.split("/", 3)[3]


async def _new_task(
    request: Request, asked: _Asked, repeat_key: str, services: Services
) -> NewTask:
    """The task that is asked for.

    Raises:
        BadRequest: no worker of this server could do it, or fetch its pictures.
    """
    wanted, webhook, _ = asked
    bases = (str(request.base_url), services.settings.public_url)
    for name, sent in sent_pictures(wanted):
        check_own_url(sent, services.signer, bases, name=name)
    check_quality(wanted.quality, services.settings.backend)
    is_told_apart = bool(repeat_key) or wanted.enable_sync_mode
    model = _model_of(request)
    return NewTask(
        key_id=request.state.key_id,
        model=model,
        input=wanted.parameters(),
        request_id=request.state.request_id,
        webhook_url=services.webhooks.register(webhook, str(request.base_url)) if webhook else None,
        shape=wanted.shape,
        fingerprint=services.fleet.last.fingerprint,
        output_bytes=most_output_bytes(
            *parse_size(wanted.size, MIN_SIDE_OF_ALIASES), wanted.num_images
        ),
        idempotency_key=repeat_key,
        digest=await asyncio.to_thread(wanted.digest, model, webhook) if is_told_apart else "",
    )


async def _left_alone(new: NewTask, asked: _Asked, services: Services) -> Replayed | None:
    """The task of an equal request in sync mode whose caller left less than a minute ago."""
    if not asked.wanted.enable_sync_mode or new.idempotency_key:
        return None
    task = await services.rejoining.task_left(new.key_id, new.digest)
    return Replayed(task) if task else None


async def _accept(
    new: NewTask, asked: _Asked, reservation: Reservation, services: Services
) -> Created | Replayed:
    """Store the task and its pictures; nothing is left of one that was not created.

    Raises:
        ApiError: it was not created.
    """
    acceptance: Acceptance | None = None
    if has_inline_pictures(asked.wanted):  # others cost as much to store as to look for a place for
        least = new_bytes(new) + least_picture_bytes(asked.wanted, asked.texts)
        acceptance = await _foresee(new, reservation, services, needed_bytes=least)
    acceptance = acceptance or await _store(new, asked, services)
    if isinstance(acceptance, Created):
        metrics.ACCEPTED.inc()
    if isinstance(acceptance, Created | Replayed):
        return acceptance
    raise refusal(acceptance, services)


async def _foresee(
    new: NewTask, reservation: Reservation, services: Services, *, needed_bytes: int
) -> Acceptance | None:
    """What becomes of the task, if that is known before its pictures are stored."""
    refused = await reservation.reserve(needed_bytes)
    # A replay must not store its picture again. After looking for a place, which the first request
    # with the key may have taken meanwhile.
    known: Acceptance | None = None
    if new.idempotency_key:
        known = await asyncio.to_thread(services.idempotency.recall, new)
    return known or refused


async def _store(new: NewTask, asked: _Asked, services: Services) -> Acceptance:
    """Store the pictures, then the task; delete the pictures again if it is not created."""
    async with services.bodies.turn_for(asked.texts):
        pictures = await store_pictures(
            asked.wanted,
            new.id,
            services.blobs,
            threads=services.storage_threads,
            long_texts=asked.texts,
            folder=services.bodies.folder,
        )
    new.input.update(pictures.noted)
    new = replace(new, picture_bytes=pictures.counted_bytes)
    try:
        acceptance = await services.accept(new)
    except DATABASE_AWAY as error:
        raise await _not_stored(new, error, services) from None
    if not isinstance(acceptance, Created):
        await forget_pictures(new.input, new.id, services.blobs, services.storage_threads)
    return acceptance


async def _not_stored(new: NewTask, error: Exception, services: Services) -> Unavailable:
    """What to say of a task that the database did not take, or may have taken."""
    metrics.REJECTED.labels("database").inc()
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        text = (  # then it needs its picture
            "The database went away while the task was being stored, so it may have been accepted; "
            "with an Idempotency-Key a repeated request makes no second one."
        )
    else:
        await forget_pictures(new.input, new.id, services.blobs, services.storage_threads)
        text = "The task could not be stored (database busy, or disk full); nothing was started."
    return Unavailable(text, headers={"Retry-After": "5"})


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
            "requestBody": json_body(requests_of(model), SUBMIT_EXAMPLE),
        },
    }


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
async def webhook_secret(request: Request, services: ServicesDep) -> JSONResponse:
    """The secret that signs the webhooks of this key; made when it is first asked for."""
    secret = await asyncio.to_thread(services.webhooks.secret, request.state.key_id)
    return JSONResponse(envelope({"secret": secret}), headers={"Cache-Control": "no-store"})


@catch_all.post("/api/{version}/{path:path}", include_in_schema=False)
async def unknown_model(version: str, path: str) -> Response:
    """Say which models there are."""
    raise NotFound(f"No model {path[:100]!r} here; available are {', '.join(MODELS)}.")
