"""A task in a worker's hands: what it is, how far it is, and whether it is still wanted."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import structlog

from redux_server import metrics
from redux_server.tasks import Task


class Abandoned(Exception):
    """Work on a task stops without an end: it was lost to another worker, or we are stopping."""


class Cancelled(Exception):
    """Work on a task stops because its owner does not want it any more."""


@dataclass(slots=True, eq=False)
class Held:
    """A task this worker has leased. Written by its lane, the device and the heartbeat thread."""

    task: Task
    step: int = 0
    is_lost: bool = False
    is_cancelled: bool = False
    timings: dict[str, int] = field(default_factory=dict)

    @property
    def is_suspect(self) -> bool:
        """Whether it may have killed a worker: it is worked on alone."""
        return self.task.crashes > 0

    def check_wanted(self) -> None:
        """Raise ``Abandoned`` or ``Cancelled`` if there is no point in going on."""
        if self.is_lost:
            raise Abandoned("its lease ran out, or it was deleted")
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


def logged_together(group: list[Held]) -> AbstractContextManager[None]:
    """``Held.logged`` of one task; of several, log lines name them all."""
    if len(group) == 1:
        return group[0].logged()
    return structlog.contextvars.bound_contextvars(task_ids=[each.task.id for each in group])
