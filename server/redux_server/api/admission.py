"""Whether a submit is let in, and what it is told if not.

Each check raises the error that the caller is to see. Stores nothing, and decodes no body.
"""

import asyncio
import math

from fastapi import Request

from redux_server import metrics
from redux_server.api.fleet import Fleet
from redux_server.api.limits import RateLimit, Refusal, Reservation
from redux_server.api.services import Services
from redux_server.errors import (
    ApiError,
    BadRequest,
    Conflict,
    QueueFull,
    StorageFull,
    TooManyRequests,
    Unavailable,
)
from redux_server.storage.disk import refuse_without_room
from redux_server.tasks.task import KeyConflict, KeyFull, NoRoom, ShareFull, StoreFull

MAX_IDEMPOTENCY_KEY = 255
_SMALL_BODY = 64 * 2**10


def check_draining(services: Services) -> None:
    """Refuse everything once the server is stopping."""
    if services.draining.is_on:
        metrics.REJECTED.labels("draining").inc()
        raise Unavailable(
            "This server is stopping and accepts no task any more; nothing was started.",
            headers={"Retry-After": "5"},
        )


def check_rate(key_id: str, services: Services) -> None:
    """Refuse what comes faster than ``--rate-limit``."""
    refuse_excess(services.rate, key_id, may=f"submit {services.settings.rate_limit} tasks")


def refuse_excess(rate: RateLimit, key_id: str, *, may: str) -> None:
    """Count one of ``key_id``; ``may`` says what it may do, as in "submit 5 tasks".

    Raises:
        TooManyRequests: it comes faster than ``rate`` allows.
    """
    wait_s = rate.take(key_id)
    if wait_s:
        metrics.REJECTED.labels("rate_limit").inc()
        raise TooManyRequests(
            f"This API key may {may} a minute; the next one in {math.ceil(wait_s)} s.",
            headers={"Retry-After": str(math.ceil(wait_s))},
        )


def check_disk(services: Services) -> None:
    """Refuse everything while the disk is nearly full."""
    refuse_without_room(
        services.disk, refused="No task is accepted now", therefore="nothing was started"
    )


async def check_workers(services: Services) -> Fleet:
    """Refuse everything while no worker can load its model; the workers otherwise."""
    fleet = await services.fleet.now()
    if failure := fleet.failure:
        metrics.REJECTED.labels("no_model").inc()
        raise Unavailable(
            f"No worker can load its model, so nothing was started: {failure}",
            headers={"Retry-After": "30"},
        )
    return fleet


async def check_place(
    request: Request, repeat_key: str, reservation: Reservation, services: Services
) -> None:
    """Refuse a large body for want of a place in the queue, without keeping any of it.

    A small one is here as soon as we have looked. ``repeat_key`` is the idempotency key: what may
    be a repeated request is read whatever the queue has.
    """
    if 0 <= int(request.headers.get("content-length", "-1")) <= _SMALL_BODY:
        return
    found = await reservation.look()
    if found is None:
        return
    knows = services.idempotency.knows
    is_repeated = bool(repeat_key) and await asyncio.to_thread(
        knows, reservation.key_id, repeat_key
    )
    if is_repeated:
        return
    error = refusal(found, services)
    if request.headers.get("expect", "").lower() == "100-continue":
        error.headers["Connection"] = "close"  # whoever waits for our word need not send it at all
    else:
        await _discard_body(request)
    raise error


async def _discard_body(request: Request) -> None:
    """Wait for its end.

    Most clients read no answer before they have sent everything, and a connection whose answer was
    given is not kept open for long: on a slow line they would find it closed, and no answer.
    """
    async for _ in request.stream():
        pass


def idempotency_key(request: Request) -> str:
    """The request's idempotency key; empty if it has none.

    Raises:
        BadRequest: it cannot be one.
    """
    key: str | None = request.headers.get("idempotency-key")
    if key is None:
        return ""
    if not (0 < len(key) <= MAX_IDEMPOTENCY_KEY and key.isascii() and key.isprintable()):
        raise BadRequest(
            f"Idempotency-Key must be 1 to {MAX_IDEMPOTENCY_KEY} printable ASCII characters, "
            f"such as a UUID; got {len(key)} characters."
        )
    return key


def check_quality(quality: str | None, backend: str) -> None:
    """Refuse at once what every worker of this server would fail."""
    if quality not in (None, "exact") and backend != "engine":
        raise BadRequest(
            f'quality must be "exact": this server runs --backend {backend}, which has no other; '
            f'got "{quality}".'
        )


def refusal(acceptance: KeyConflict | Refusal, services: Services) -> ApiError:
    """What to raise for a task that was not accepted."""
    if isinstance(acceptance, KeyFull):
        metrics.REJECTED.labels("key_full").inc()
        return QueueFull(
            f"This API key has {services.settings.max_open_per_key} open tasks, as many as it may; "
            "wait for one to end.",
            headers={"Retry-After": "5"},
        )
    if isinstance(acceptance, ShareFull):
        metrics.REJECTED.labels("share_full").inc()
        return QueueFull(
            "This API key has its share of the queue, and the places that are left are for others "
            f"({services.settings.max_queue} open tasks may be, --queue-share "
            f"{services.settings.queue_share}); wait for one of its tasks to end.",
            headers={"Retry-After": "5"},
        )
    if isinstance(acceptance, StoreFull):
        metrics.REJECTED.labels("tasks_stored").inc()
        return _too_much_stored(acceptance, services)
    if isinstance(acceptance, NoRoom):
        metrics.REJECTED.labels("queue_full").inc()
        return QueueFull(
            f"The queue is full ({services.settings.max_queue} open tasks); try again shortly.",
            headers={"Retry-After": "5"},
        )
    metrics.REJECTED.labels("idempotency").inc()
    what = (
        "The task that this Idempotency-Key made was deleted"
        if acceptance.is_gone
        else "This Idempotency-Key came with another request before"
    )
    return Conflict(f"{what}; send a new key with a new request. Nothing was started.")


def _too_much_stored(full: StoreFull, services: Services) -> StorageFull:
    settings = services.settings
    most = f"--max-stored-tasks {settings.max_stored_tasks} MiB, " * bool(settings.max_stored_tasks)
    return StorageFull(
        f"The tasks of this API key may store {full.left_bytes:,} bytes more, and this one needs "
        f"{full.needed_bytes:,} for its inline pictures and images ({most}--disk-share "
        f"{settings.disk_share} percent). Delete tasks that are not needed, with POST "
        "/api/v3/predictions/delete, or wait: they are deleted "
        f"{settings.retention_hours:g} hours after their end.",
        headers={"Retry-After": "60"},
    )
