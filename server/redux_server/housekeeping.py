"""What the API process does on its own: deletes old tasks, reads gauges."""

import asyncio
import shutil
import time

import structlog

from redux_server.metrics import Gauges
from redux_server.presence import WorkerState
from redux_server.services import Services
from redux_server.tasks import TASK_ID

SWEEP_EVERY_S = 300.0
STRAY_AFTER_S = 3600.0
_log = structlog.get_logger("redux_server.housekeeping")


def start(services: Services) -> "asyncio.Task[None]":
    """Sweep now and every few minutes, until cancelled."""
    return asyncio.create_task(_sweep_forever(services))


def sweep(services: Services) -> int:
    """Delete tasks that ended longer ago than they are kept, with their files; returns how many."""
    oldest = time.time() - services.settings.retention_hours * 3600
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
    old = services.blobs.tasks_before(time.time() - STRAY_AFTER_S)
    names = [name for name in sorted(old) if TASK_ID.fullmatch(name)]
    strays = []
    for start_ in range(0, len(names), 500):
        batch = names[start_ : start_ + 500]
        found = services.store.get(batch)
        strays += [name for name, task in zip(batch, found, strict=True) if task is None]
    for name in strays:
        services.blobs.delete_under(name)
    return len(strays)


def gauges(services: Services) -> Gauges:
    """The values that are read, not counted."""
    queue = services.store.queue_state()
    alive = sum(w.state is WorkerState.READY for w in services.presence.all())
    free = shutil.disk_usage(services.settings.data_dir).free
    return {
        ("num_tasks_waiting", "Tasks that wait for a worker."): queue.waiting,
        ("num_tasks_running", "Tasks that a worker holds."): queue.running,
        ("oldest_waiting_seconds", "Age of the oldest waiting task."): queue.oldest_waiting_s,
        ("workers_alive", "Workers that take tasks."): alive,
        ("disk_free_bytes", "Free space where the data is."): free,
    }


async def _sweep_forever(services: Services) -> None:
    while True:
        try:
            deleted = await asyncio.to_thread(sweep, services)
            strays = await asyncio.to_thread(sweep_strays, services)
            if deleted or strays:
                _log.info("deleted old tasks", count=deleted, strays=strays)
        except Exception as error:  # a full disk today must not end the sweeps of tomorrow
            _log.error("sweep failed", exc_info=error)
        await asyncio.sleep(SWEEP_EVERY_S)
