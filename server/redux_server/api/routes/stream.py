"""A task's progress as server-sent events."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.types import Message, Receive, Scope, Send

from redux_server import metrics
from redux_server.api.dependencies import ServicesDep, find_mine, no_task
from redux_server.api.following import MAX_STREAMS_OF_A_KEY, Subscription, TooManySubscriptions
from redux_server.api.openapi import responses
from redux_server.api.services import Services
from redux_server.database.connection import DATABASE_AWAY
from redux_server.errors import TooManyRequests, Unavailable, error_body
from redux_server.tasks.task import Task

HEARTBEAT_S = 15.0
POSITION_EVERY_S = 1.0
LONGEST_S = 600.0  # then the client comes back, and its key is looked at again
PATIENCE_S = 30.0  # how long a reader may take for one event
RETRY_MS = 2000
_DESCRIPTION = (
    "An extension of this server. The prediction object at once, and again at each change of its "
    "status, its steps or its position in the queue, as server-sent events: `progress` while the "
    "task is open, `end` when it has ended (and with it the stream), `gone` if it was deleted. "
    "With the `Last-Event-ID` of a `progress` event, the state that it told of is not told again; "
    "with that of an `end`, the answer is 204. Streams also end after ten minutes, and when the "
    "server stops. With `preview=1`, or where the task has `enable_preview`, `preview` events tell "
    "how an image forms: small JPEGs, up to five a second, without an id. There are none where the "
    "server has to check every image."
)
_SCHEMAS = "#/components/schemas/"
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["progress", "preview", "end", "gone"]},
        "id": {"type": "string"},
        "retry": {"type": "integer"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {
                "anyOf": [
                    {"$ref": f"{_SCHEMAS}Prediction"},
                    {"$ref": f"{_SCHEMAS}ErrorBody"},
                    {
                        "type": "object",
                        "required": ["step", "image", "data"],
                        "properties": {
                            "step": {"type": "integer"},
                            "image": {"type": "integer"},
                            "data": {"type": "string", "format": "uri"},
                        },
                    },
                ]
            },
        },
    },
}
_PREVIEW = {
    "name": "preview",
    "in": "query",
    "required": False,
    "schema": {"type": "string", "enum": ["0", "1"]},
    "description": "1 has previews made and told",
}
_LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "The id of the last event that came",
}

router = APIRouter(tags=["predictions"])


class EventStream(StreamingResponse):
    """Server-sent events; ``release`` is called when the stream is over, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], release: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers)
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(PATIENCE_S):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            return  # nobody reads; what is left open is closed for it
        finally:
            self._release()


@router.get(
    "/api/v3/predictions/{task_id}/stream",
    summary="Follow a task",
    description=_DESCRIPTION,
    response_class=Response,  # no media type of its own, which errors would be said to have too
    responses={
        **responses(401, 404, 429, 503),
        200: {
            "description": "The events",
            "content": {"text/event-stream": {"itemSchema": _EVENT}},
        },
        204: {"description": "The end was told already"},
    },
    openapi_extra={"parameters": [_LAST_EVENT_ID, _PREVIEW]},
)
async def stream(task_id: str, request: Request, services: ServicesDep) -> Response:
    """Tell of a task until it has ended."""
    task = await find_mine(task_id, request, services)
    last_id = request.headers.get("last-event-id", "")
    if task.status.is_terminal and last_id == event_id(task, None):
        return Response(status_code=204)
    has_previews = await _has_previews(task, request, services)
    try:
        subscription = services.streams.open(task.id, task.key_id)
    except TooManySubscriptions as error:
        raise _refusal(error) from None
    metrics.STREAMS.inc()

    def release() -> None:
        services.streams.release(subscription)
        metrics.STREAMS.dec()

    writer = EventWriter(
        services, str(request.base_url), subscription, last_id, has_previews=has_previews
    )
    return EventStream(writer.events(task), release)


async def _has_previews(task: Task, request: Request, services: Services) -> bool:
    """Whether the stream tells of previews; if so, they are made from now on."""
    if task.status.is_terminal or services.settings.force_safety_checker:
        return False
    if task.input.get("enable_preview"):
        return True
    if request.query_params.get("preview") not in ("1", "true"):
        return False
    with suppress(*DATABASE_AWAY):  # without them, then
        await asyncio.to_thread(services.previews.want, task.id)
    return True


def event_id(task: Task, position: int | None) -> str:
    """What names a state of a task: no two states that follow each other have one id."""
    return f"{task.status}-{task.attempt}-{task.progress_step}-{position or 0}"


class EventWriter:
    """What one stream says."""

    def __init__(
        self,
        services: Services,
        base_url: str,
        subscription: Subscription,
        last_id: str,
        *,
        has_previews: bool = False,
    ) -> None:
        self._services = services
        self._base_url = base_url
        self._subscription = subscription
        self._told = last_id
        self._has_previews = has_previews
        self._previewed: tuple[int, int] | None = None

    async def events(self, task: Task) -> AsyncIterator[bytes]:
        """Everything from the state ``task`` on."""
        yield format_sse_event(retry=RETRY_MS)
        ends_at = time.monotonic() + LONGEST_S
        silent_since = time.monotonic()
        found: Task | None = task
        while not self._services.streams.is_closed and time.monotonic() < ends_at:
            if found is None:
                yield self._gone()
                return
            event = await self._event(found)
            event += await self._preview(found)
            if event or time.monotonic() - silent_since >= HEARTBEAT_S:
                yield event or KEEPALIVE_COMMENT
                silent_since = time.monotonic()
            if found.status.is_terminal:
                return
            found = await self._next(found)
            if self._subscription.is_revoked:
                return  # who comes back is told why

    async def _next(self, task: Task) -> Task | None:
        """The task after news of it, or after a while without."""
        is_waiting = task.started_at is None
        if await self._subscription.wait(POSITION_EVERY_S if is_waiting else HEARTBEAT_S):
            try:
                return await self._services.find(task.id)
            except DATABASE_AWAY:
                self._subscription.look_again()
        return task

    async def _event(self, task: Task) -> bytes:
        """What tells of the task's state; empty if that was told last."""
        position = await self._services.queue.of(task)
        name = event_id(task, position)
        if name == self._told:
            return b""
        self._told = name
        fleet = await self._services.fleet.now()
        data = self._services.present(
            task,
            self._base_url,
            queue_position=position,
            waiting_for=fleet.waiting_for(task),
        )
        return format_sse_event(
            data_str=json.dumps(data),
            event="end" if task.status.is_terminal else "progress",
            id=name,
        )

    async def _preview(self, task: Task) -> bytes:
        """The last preview of a task that is worked on; empty if that was told, or there is none.

        It has no id: a reader that comes back goes on after the last state that it knows.
        """
        if not self._has_previews or task.started_at is None or task.status.is_terminal:
            return b""
        try:
            found = await asyncio.to_thread(self._services.previews.get, task.id)
        except DATABASE_AWAY:
            return b""
        if found is None or found.attempt != task.attempt:
            return b""
        if (name := (found.attempt, found.step)) == self._previewed:
            return b""
        self._previewed = name
        picture = f"data:image/jpeg;base64,{base64.b64encode(found.jpeg).decode()}"
        data = {"step": found.step, "image": found.index, "data": picture}
        return format_sse_event(data_str=json.dumps(data), event="preview")

    def _gone(self) -> bytes:
        error = no_task(self._subscription.task_id)
        body = error_body(error.status, error.message, error.name)
        return format_sse_event(data_str=json.dumps(body), event="gone")


def _refusal(error: TooManySubscriptions) -> TooManyRequests | Unavailable:
    if error.is_of_key:
        metrics.REJECTED.labels("streams_of_key").inc()
        return TooManyRequests(
            f"This API key has {MAX_STREAMS_OF_A_KEY} streams open, as many as it may; poll, or "
            "close one.",
            headers={"Retry-After": "5"},
        )
    metrics.REJECTED.labels("streams").inc()
    return Unavailable(
        "This server has no room for another stream now; poll instead.",
        headers={"Retry-After": "5"},
    )
