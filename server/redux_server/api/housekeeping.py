"""What the API process does on its own: deletes what is old, reads gauges."""

import asyncio
import contextlib
import math
import time

import structlog
from sqlalchemy.exc import SQLAlchemyError

from redux_server.api.fleet import Fleet
from redux_server.api.services import Services
from redux_server.metrics import Gauges
from redux_server.storage.temporary import remake_temporary_folder
from redux_server.tasks.task import TASK_ID

SWEEP_EVERY_S = 300.0
FORGET_WORKERS_S = 3600.0
STRAY_AFTER_S = 3600.0
IDEMPOTENCY_KEYS_KEPT_S = 24 * 3600.0
BALLAST_EVERY_S = 15.0
CATCH_UP_EVERY_S = 15.0
_log = structlog.get_logger("redux_server.api.housekeeping")


def start(services: Services) -> "asyncio.Task[None]":
    """Sweep now and every few minutes, and keep ballast and folders there, until cancelled."""

    async def all_() -> None:
        await asyncio.gather(
            _sweep_forever(services), _hold_ballast(services), _catch_up_forever(services)
        )

    return asyncio.create_task(all_())


def sweep_all(services: Services) -> None:
    """Delete all whose time is over, unless the date cannot be believed."""
    if not services.clock_guard.believes():
        _log.error(
            "the date has jumped, so nothing is deleted until it is put right, or has gone on for "
            "an hour",
            jumped_by_days=round(services.clock_guard.jump_s / 86400, 1),
        )
        return
    found = {"count": sweep(services)}
    sweep_idempotency_keys(services)
    services.presence.forget_gone(FORGET_WORKERS_S)
    services.previews.sweep()
    if services.store_owner.look(lambda: _tasks_before(services, math.inf)):
        found["strays"] = sweep_strays(services)
        # Their dates are those of the machine, or the bucket, that stored them.
        found["uploads"] = services.uploads.sweep(_file_now(services))
    if any(found.values()):
        _log.info("deleted old tasks", **found)


def sweep(services: Services) -> int:
    """Delete tasks that ended longer ago than they are kept, with their files; returns how many.

    One whose webhook is still to be delivered waits for that.
    """
    oldest = services.clock() - services.settings.retention_hours * 3600
    deleted = 0
    while ids := services.store.ended_before(oldest):
        for task_id in ids:
            services.blobs.delete_under(task_id)
        services.store.delete(ids)
        deleted += len(ids)
    return deleted


def sweep_strays(services: Services) -> int:
    """Delete files of tasks that do not exist; returns of how many.

    A picture sent inline is stored before its task is accepted, and the process may die between.
    """
    names = _tasks_before(services, _file_now(services) - STRAY_AFTER_S)
    strays = []
    for start_ in range(0, len(names), 500):
        batch = names[start_ : start_ + 500]
        found = services.store.get(batch)
        strays += [name for name, task in zip(batch, found, strict=True) if task is None]
    for name in strays:
        services.blobs.delete_under(name)
    return len(strays)


def _tasks_before(services: Services, when: float) -> list[str]:
    return sorted(filter(TASK_ID.fullmatch, services.blobs.tasks_before(when)))


def _file_now(services: Services) -> float:
    """What to compare the dates of files with, which other clocks than the database's wrote.

    The earlier of the two: nothing is deleted that is old by one of them alone.
    """
    return min(services.clock(), time.time())


def sweep_idempotency_keys(services: Services) -> int:
    """Free the idempotency keys that are a day old; returns how many."""
    return services.idempotency.forget(services.clock() - IDEMPOTENCY_KEYS_KEPT_S)


def gauges(services: Services) -> Gauges:
    """The values that are read from the database, not counted."""
    queue = services.store.queue_state()
    fleet = Fleet(tuple(services.presence.all()))
    stored = services.store.stored_bytes()
    unserved = fleet.unserved(services.store.bound()) if fleet.ready else {}
    return {
        ("num_tasks_waiting", "Tasks that wait for a worker."): queue.waiting,
        ("num_tasks_running", "Tasks that a worker holds."): queue.running,
        ("oldest_waiting_seconds", "Age of the oldest waiting task."): queue.oldest_waiting_s,
        (
            "num_webhooks_waiting",
            "Webhooks not delivered yet.",
        ): services.webhooks.outbox.count_open(),
        ("workers_alive", "Workers that take tasks."): len(fleet.ready),
        (
            "num_tasks_unserved",
            "Waiting tasks that were accepted for what no ready worker runs.",
        ): sum(unserved.values()),
        ("tasks_stored_bytes", "What tasks and their pictures count."): stored.total(),
        (
            "tasks_stored_bytes_max",
            "What those of the API key count that stores most.",
        ): max(stored.values(), default=0),
    }


def own_gauges(services: Services, *, is_database_up: bool) -> Gauges:
    """The values that need no database."""
    return {
        ("database_up", "Whether the database answers."): float(is_database_up),
        ("disk_free_bytes", "Free space where the data is."): services.disk.free_bytes(),
        (
            "clock_jump_seconds",
            "By how much the date is off from when it was last believed; while it is not, nothing "
            "is deleted for its age.",
        ): services.clock_guard.jump_s,
        (
            "pictures_foreign",
            "Whether the store of pictures belongs to another database.",
        ): float(services.store_owner.is_foreign),
    }


async def _sweep_forever(services: Services) -> None:
    while True:
        try:
            await asyncio.to_thread(sweep_all, services)
        except Exception as error:  # a full disk today must not end the sweeps of tomorrow
            _log.error("sweep failed", exc_info=error)
        await asyncio.sleep(SWEEP_EVERY_S)


async def _catch_up_forever(services: Services) -> None:
    while True:
        await asyncio.sleep(CATCH_UP_EVERY_S)
        try:
            mended = await asyncio.to_thread(services.store.catch_up)
            if mended:
                _log.warning("the clock was set back: tasks had times ahead of it", count=mended)
        except SQLAlchemyError as error:  # a database that is away now will be back
            _log.error("times of tasks could not be looked at", exc_info=error)


async def _hold_ballast(services: Services) -> None:
    while True:
        await asyncio.to_thread(_hold, services)
        await asyncio.sleep(BALLAST_EVERY_S)


def _hold(services: Services) -> None:
    services.ballast.hold()
    with contextlib.suppress(OSError):  # a full disk: at the next time
        remake_temporary_folder()
