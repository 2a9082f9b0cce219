"""Receives tickets in a worker process: a Celery worker in a thread, which only ever wakes ours.

One pool thread handles one ticket at a time and keeps it until our worker has looked for a task. A
worker that is busy hands it on, so that an idle one gets it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import structlog
from celery import Celery, bootsteps
from celery.exceptions import Reject
from celery.worker import WorkController, state
from celery.worker.consumer import Consumer

from redux_server.dispatch.celery import TICKET, send_ticket

LOOK_S = 2.0  # how long a look into the database may take
MOST_PASSES = 16  # by then all workers are busy, most likely, and will look by themselves
_PASS_PAUSE_S = 0.02
_log = structlog.get_logger("redux_server.dispatch.celery_worker")


class WakesWorker(Protocol):
    """What a ticket is for."""

    def look(self, timeout_s: float) -> bool:
        """Look for work at once; False when there was no time for that."""
        ...

    @property
    def is_stopping(self) -> bool:
        """True once it will look no more."""
        ...


class TicketConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer without what tickets do not need.

    Left out: talk between workers, remote control, and delayed delivery, which would declare 28
    more queues.
    """

    class Blueprint(bootsteps.Blueprint):  # type: ignore[misc]
        """The parts, in Celery's own order."""

        name = "Tickets"
        default_steps = (
            "celery.worker.consumer.connection:Connection",
            "celery.worker.consumer.events:Events",
            "celery.worker.consumer.tasks:Tasks",
            "celery.worker.consumer.consumer:Evloop",
        )

        def shutdown(self, parent: Any) -> None:
            """As Celery's own."""
            self.send_all(parent, "shutdown")


@contextmanager
def receiving(app: Celery, worker: WakesWorker) -> Iterator[None]:
    """Have tickets wake ``worker`` meanwhile; a broker that is away is waited for."""

    @app.task(name=TICKET)  # type: ignore[untyped-decorator]
    def ticket(passed_on: int = 0) -> None:
        answer(app, worker, passed_on)

    controller = WorkController(
        app=app,
        hostname=None,
        pool="threads",
        concurrency=1,
        consumer_cls=TicketConsumer,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        loglevel="WARNING",
    )
    thread = threading.Thread(target=controller.start, name="celery", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop_receiving()
        thread.join(10.0)
        state.should_stop = None


def stop_receiving() -> None:
    """Fetch no more tickets; Celery has one flag for that in a process."""
    state.should_stop = 0


def answer(app: Celery, worker: WakesWorker, passed_on: int) -> None:
    """Handle one ticket; returning acknowledges it.

    That is after our worker has looked and before the task it found is done: from the claim on the
    lease in the database guards the task, and a ticket kept for the minutes of a task would run
    into the broker's own time limits.

    Raises:
        Reject: our worker is stopping; the ticket goes back to the queue.
    """
    if worker.look(LOOK_S):
        return
    if worker.is_stopping:
        stop_receiving()  # or it would come back at once, again and again
        raise Reject("the worker is stopping", requeue=True)
    if passed_on < MOST_PASSES:
        time.sleep(_PASS_PAUSE_S)
        try:
            send_ticket(app, passed_on=passed_on + 1)
        except Exception as error:  # lost: our own slow poll and the reconciler are there for that
            _log.warning("could not pass a ticket on", reason=str(error))
