"""A task that a worker has leased: how far it is, whether it is still wanted, how its end is kept.

Ends are written down however long the database is away, and counted. Knows no pictures and no
pipeline.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from redux_server import metrics
from redux_server.storage.disk import Ballast
from redux_server.tasks.store import LONGEST_DELAY_S, TaskStore
from redux_server.tasks.task import Code, Outcome, Task
from redux_server.worker.outputs import Postponed

MAX_STARTS = 20  # of a task whose images cannot be stored, before it is given up
_PAUSES_S = (0.2, 1.0, 5.0)
_log = structlog.get_logger("redux_server.worker.leased")


class Abandoned(Exception):
    """Work on a task stops without an end: it was lost to another worker, or we are stopping."""


class Cancelled(Exception):
    """Work on a task stops because its owner does not want it any more."""


@dataclass(slots=True, eq=False)
class LeasedTask:
    """A task this worker has leased. Written by its lane, the device and the heartbeat thread."""

    task: Task
    step: int = 0
    is_lost: bool = False
    is_cancelled: bool = False
    timings: dict[str, int] = field(default_factory=dict)
    costs_s: list[float] = field(default_factory=list)
    kept_bytes: int | None = 0  # of its images; None if some of other attempts may be there

    @property
    def cost_s(self) -> float:
        """Seconds of fetching, and of the device, that it has taken so far."""
        return sum(self.costs_s)

    @property
    def is_suspect(self) -> bool:
        """Whether it may have killed a worker: it is worked on alone."""
        return self.task.crashes > 0

    def keep(self, size_bytes: int) -> None:
        """Note an image that was stored."""
        if self.kept_bytes is not None:
            self.kept_bytes += size_bytes

    def check_wanted(self) -> None:
        """Raise ``Abandoned`` or ``Cancelled`` if there is no point in going on."""
        if self.is_lost:
            raise Abandoned("its lease ran out, it was deleted, or its end is recorded")
        if self.is_cancelled:
            raise Cancelled

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Note how long a stage took, in whole milliseconds."""
        started = time.perf_counter()
        yield
        self.note(stage, time.perf_counter() - started)

    def note(self, stage: str, seconds: float) -> None:
        """Note a stage's time."""
        self.timings[stage] = round(seconds * 1000)
        metrics.STAGES.labels(stage).observe(seconds)

    def logged(self) -> AbstractContextManager[None]:
        """Log lines within this context say which task they are about."""
        task = self.task
        return structlog.contextvars.bound_contextvars(
            task_id=task.id, attempt=task.attempt, request_id=task.request_id
        )


def logged_together(group: list[LeasedTask]) -> AbstractContextManager[None]:
    """``LeasedTask.logged`` of one task; of several, log lines name them all."""
    if len(group) == 1:
        return group[0].logged()
    return structlog.contextvars.bound_contextvars(task_ids=[each.task.id for each in group])


class EndRecorder:
    """Records ends in a store. What cannot be recorded is left to be done again."""

    def __init__(self, store: TaskStore, ballast: Ballast) -> None:
        self._store = store
        self._ballast = ballast

    def finish(self, leased: LeasedTask, outcome: Outcome) -> None:
        """Record how a task ended, unless another worker has taken it over."""
        task = leased.task
        recorded = self._persist(
            lambda: self._store.finish(
                task.id,
                task.attempt,
                outcome,
                cost_s=leased.cost_s,
                kept_bytes=leased.kept_bytes,
            )
        )
        if recorded:
            _report(leased, outcome)
        elif recorded is not None:
            metrics.FENCED.inc()
            _log.warning("task abandoned", reason="another worker has taken it over")

    def give_back(self, leased: LeasedTask, reason: str) -> None:
        """Return a task that cost us the device; after the last attempt it fails for ``reason``."""
        task = leased.task
        text = f"This task cost too many workers their device. The last time: {reason}"
        self._persist(
            lambda: self._store.give_back(task.id, task.attempt, error=text, has_crashed=True)
        )

    def postpone(self, leased: LeasedTask, postponed: Postponed) -> None:
        """Return a task that cannot end now, so that it is neither failed nor lost."""
        task = leased.task
        if task.attempt >= MAX_STARTS:
            text = f"{postponed.public} in {task.attempt} attempts."
            self.finish(leased, Outcome.failure(Code.INTERNAL, text))
            return
        delay_s = min(LONGEST_DELAY_S, 5.0 * 2.0 ** min(task.attempt - 1, 6))
        _log.warning("task returned for later", reason=str(postponed), delay_s=delay_s)
        self._persist(lambda: self._store.give_back(task.id, task.attempt, delay_s=delay_s))

    def _persist(self, action: Callable[[], bool]) -> bool | None:
        """What ``action`` says; None if the database stayed away."""
        for pause_s in (*_PAUSES_S, None):
            try:
                return self._ballast.make_room_for(action)
            except SQLAlchemyError as error:
                # Unrecorded, the lease runs out and the task is done again: late, but not lost.
                _log.error("could not record the end of a task", exc_info=error)
                if pause_s is not None:
                    time.sleep(pause_s)
        return None


def _report(leased: LeasedTask, outcome: Outcome) -> None:
    now, task = time.time(), leased.task
    metrics.count_end(outcome.status, outcome.code)
    metrics.E2E.observe(max(0.0, now - task.created_at))
    metrics.QUEUED.observe(max(0.0, (task.started_at or now) - task.created_at))
    metrics.INFERENCE.observe(outcome.timings.get("inference", 0) / 1000)
    details: dict[str, Any] = {"status": outcome.status.value, "timings_ms": outcome.timings}
    if outcome.error:
        details["error"] = outcome.error
    _log.info("task ended", **details)
