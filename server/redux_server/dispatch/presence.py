"""Which workers there are and how they are, so that any API process can answer `/readyz`."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import structlog
from sqlalchemy import Engine, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from redux_server.database.connection import reader
from redux_server.database.tables import workers

# Exit codes of worker processes that have said why they ended.
EXIT_CANNOT_LOAD = 3  # and never will, as long as nobody changes anything
EXIT_DEVICE_FAILED = 4
EXIT_NOT_YET = 5  # could not load its model; another try may succeed
_log = structlog.get_logger("redux_server.dispatch.presence")


class WorkerState(StrEnum):
    """What a worker is doing."""

    LOADING = "loading"  # reading weights and making its warm-up images
    READY = "ready"  # takes tasks
    FAILED = "failed"  # could not load; the detail says why
    GONE = "gone"  # has not been heard of for too long


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker, as last heard of."""

    id: str
    device: str
    state: WorkerState
    detail: str
    model: str = ""
    fingerprint: str = ""


class Presence:
    """The list of workers; each writes its own row."""

    def __init__(
        self, database: Engine, *, silent_s: float = 30.0, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._reader = reader(database)
        self._silent_s = silent_s
        self._clock = clock
        self._said: dict[str, dict[str, Any]] = {}

    def announce(
        self,
        worker_id: str,
        device: str,
        state: WorkerState,
        detail: str = "",
        *,
        model: str = "",
        fingerprint: str = "",
    ) -> None:
        """Add or replace a worker's row; one that is ready says what it runs."""
        said = {
            "device": device,
            "state": state,
            "detail": detail,
            "model": model[:128],
            "fingerprint": fingerprint[:64],
        }
        self._said[worker_id] = said
        values = {**said, "heartbeat_at": self._clock()}
        with self._database.begin() as db:
            changed = db.execute(update(workers).where(workers.c.id == worker_id).values(values))
            if not changed.rowcount:
                db.execute(insert(workers), {"id": worker_id, **values})

    def heartbeat(self, worker_id: str) -> None:
        """Say that a worker still lives.

        One that was taken for gone meanwhile, and forgotten, says again what it said last.
        """
        mine = workers.c.id == worker_id
        with self._database.begin() as db:
            changed = db.execute(update(workers).where(mine).values(heartbeat_at=self._clock()))
        if not changed.rowcount and (said := self._said.get(worker_id)) is not None:
            self.announce(worker_id, **said)

    @contextmanager
    def kept_alive(self, worker_id: str, *, every_s: float = 5.0) -> Iterator[None]:
        """Send heartbeats from a thread of their own, whatever the caller is busy with."""
        has_ended = threading.Event()

        def beat() -> None:
            while not has_ended.wait(every_s):
                try:
                    self.heartbeat(worker_id)
                except SQLAlchemyError as error:  # the database may be back at the next beat
                    _log.error("presence heartbeat failed", exc_info=error)

        thread = threading.Thread(target=beat, name="presence", daemon=True)
        thread.start()
        try:
            yield
        finally:
            has_ended.set()
            thread.join()

    def leave(self, worker_id: str) -> None:
        """Forget a worker."""
        self._said.pop(worker_id, None)
        with self._database.begin() as db:
            db.execute(delete(workers).where(workers.c.id == worker_id))

    def forget_gone(self, silent_s: float) -> int:
        """Forget workers that have not been heard of for ``silent_s``; returns how many.

        A machine that is switched off, or a container that is replaced, does not say goodbye.
        """
        with self._database.begin() as db:
            oldest = self._clock() - silent_s
            return int(db.execute(delete(workers).where(workers.c.heartbeat_at < oldest)).rowcount)

    def all(self) -> list[WorkerStatus]:
        """Every worker known; a silent one counts as gone."""
        with self._reader.connect() as db:
            rows = db.execute(select(workers).order_by(workers.c.id)).all()
        oldest = self._clock() - self._silent_s
        return [
            WorkerStatus(
                id=row.id,
                device=row.device,
                state=WorkerState(row.state) if row.heartbeat_at >= oldest else WorkerState.GONE,
                detail=row.detail,
                model=row.model,
                fingerprint=row.fingerprint,
            )
            for row in rows
        ]

    def fingerprints(self) -> frozenset[str]:
        """What the workers run that are ready."""
        ready = (each for each in self.all() if each.state is WorkerState.READY)
        return frozenset(each.fingerprint for each in ready)

    def has_failed(self, worker_id: str) -> bool:
        """Whether a worker last said that it cannot load its model."""
        with self._reader.connect() as db:
            state = db.scalar(select(workers.c.state).where(workers.c.id == worker_id))
        return state == WorkerState.FAILED

    def detail_of(self, worker_id: str) -> str:
        """What a worker last said of itself; empty if it is not known."""
        with self._reader.connect() as db:
            found = db.scalar(select(workers.c.detail).where(workers.c.id == worker_id))
        return found or ""
