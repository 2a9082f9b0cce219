"""Ending a task before its time: cancel it, or delete it with all that belongs to it."""

import asyncio
from collections.abc import Sequence

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from obstore.exceptions import BaseError as BlobError

from redux_server import metrics
from redux_server.api.answers import answer
from redux_server.api.dependencies import DeleteRequest, ServicesDep, ids_to_delete, no_task
from redux_server.api.openapi import DELETE_EXAMPLE, DeletedEnvelope, json_body, responses
from redux_server.api.prediction import envelope
from redux_server.api.services import Services
from redux_server.tasks.task import TASK_ID

router = APIRouter(tags=["predictions"])
_log = structlog.get_logger("redux_server.api.routes.cancel")


@router.post(
    "/api/v3/predictions/{task_id}/cancel",
    summary="Cancel a task",
    description="An extension of this server. A task that waits is cancelled at once. One that is "
    "being worked on stops at its next denoising step; until then the answer says `processing`. "
    "One that has ended is answered as it is.",
    responses=responses(401, 404, 503),
)
async def cancel(task_id: str, request: Request, services: ServicesDep) -> JSONResponse:
    """End a task; its owner does not want it any more."""
    if not TASK_ID.fullmatch(task_id):
        raise no_task(task_id)
    cancelled = await asyncio.to_thread(services.store.cancel, task_id, request.state.key_id)
    if cancelled is None:
        raise no_task(task_id)
    if cancelled.has_ended_it and (outcome := cancelled.task.outcome) is not None:
        metrics.count_end(outcome.status, outcome.code)
    return answer(cancelled.task, request, services)


@router.delete(
    "/api/v3/predictions/{task_id}",
    summary="Delete a task",
    description="Cancels the task if it has not ended, and deletes it with its pictures.",
    responses=responses(401, 404, 503, model=DeletedEnvelope),
)
async def delete_one(task_id: str, request: Request, services: ServicesDep) -> JSONResponse:
    """Forget one task."""
    deleted = await _delete([task_id], request, services)
    if not deleted:
        raise no_task(task_id)
    return JSONResponse(envelope({"deleted_count": deleted}))


@router.post(
    "/api/v3/predictions/delete",
    summary="Delete tasks",
    description="As deleting each. Ids that are unknown, or another key's, are not counted.",
    responses=responses(400, 401, 413, 503, model=DeletedEnvelope),
    openapi_extra={"requestBody": json_body(DeleteRequest, DELETE_EXAMPLE)},
)
async def delete_many(request: Request, services: ServicesDep) -> JSONResponse:
    """Forget some tasks."""
    ids = await ids_to_delete(request, "task")
    deleted = await _delete(ids, request, services)
    return JSONResponse(envelope({"deleted_count": deleted}))


async def _delete(ids: Sequence[str], request: Request, services: Services) -> int:
    known = sorted({task_id for task_id in ids if TASK_ID.fullmatch(task_id)})
    gone = await asyncio.to_thread(services.store.delete, known, key_id=request.state.key_id)
    await _delete_files(gone, services)
    return len(gone)


async def _delete_files(ids: Sequence[str], services: Services) -> None:
    for task_id in ids:
        try:
            await services.storage_threads(services.blobs.delete_under, task_id)
        except (OSError, BlobError) as error:  # the rows are gone: sweeps find what is left
            _log.error("could not delete files", task_id=task_id, exc_info=error)
