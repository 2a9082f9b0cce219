"""Writing down how tasks ended, however long the database is away, and counting them."""

import time
from collections.abc import Callable
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from redux_server import metrics
from redux_server.disk import Ballast
from redux_server.held import Held
from redux_server.store import TaskStore
from redux_server.tasks import Code, Outcome

MAX_STARTS = 20  # of a task whose images cannot be stored, before it is given up
_PAUSES_S = (0.2, 1.0, 5.0)
_log = structlog.get_logger("redux_server.recording")


class Recorder:
    """Records ends in a store. What cannot be recorded is left to be done again."""

    def __init__(self, store: TaskStore, ballast: Ballast) -> None:
        self._store = store
        self._ballast = ballast

    def finish(self, held: Held, outcome: Outcome) -> None:
        """Record how a task ended, unless another worker has taken it over."""
        task = held.task
        recorded = self._persist(lambda: self._store.finish(task.id, task.attempt, outcome))
        if recorded:
            _report(held, outcome)
        elif recorded is not None:
            metrics.FENCED.inc()
            _log.warning("task abandoned", reason="another worker has taken it over")

    def give_back(self, held: Held, reason: str) -> None:
        """Return a task that cost us the device; after the last attempt it fails for ``reason``."""
        task = held.task
        text = f"This task cost too many workers their device. The last time: {reason}"
        self._persist(
            lambda: self._store.give_back(task.id, task.attempt, error=text, has_crashed=True)
        )

    def postpone(self, held: Held, reason: str) -> None:
        """Return a task that cannot end now, so that it is neither failed nor lost."""
        task = held.task
        if task.attempt >= MAX_STARTS:
            text = f"The images could not be stored in {task.attempt} attempts."
            self.finish(held, Outcome.failure(Code.INTERNAL, text))
            return
        delay_s = min(300.0, 5.0 * 2.0 ** min(task.attempt - 1, 6))
        _log.warning("task returned for later", reason=reason, delay_s=delay_s)
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


def _report(held: Held, outcome: Outcome) -> None:
    now, task = time.time(), held.task
    metrics.count_end(outcome)
    metrics.E2E.observe(max(0.0, now - task.created_at))
    metrics.QUEUED.observe(max(0.0, (task.started_at or now) - task.created_at))
    metrics.INFERENCE.observe(outcome.timings.get("inference", 0) / 1000)
    details: dict[str, Any] = {"status": outcome.status.value, "timings_ms": outcome.timings}
    if outcome.error:
        details["error"] = outcome.error
    _log.info("task ended", **details)
