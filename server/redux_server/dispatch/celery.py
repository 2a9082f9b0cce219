"""How tasks reach workers on other machines: by tickets, which Celery carries through a broker.

A ticket is a message that says "there is work", and holds nothing but how often it was passed on.
Losing one costs time, a second one a look at the database; so nothing here needs to be more careful
than a broker is by default, and what a broker offers is used to lose few: quorum queues, late
acknowledgement, publisher confirms. Knows no task and no worker process.
"""

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import structlog
from celery import Celery
from kombu import Exchange, Queue
from sqlalchemy import Engine, insert, or_, update
from sqlalchemy.exc import IntegrityError

from redux_server import metrics
from redux_server.database import tables
from redux_server.dispatch.fingerprint import served
from redux_server.dispatch.presence import Presence, WorkerState
from redux_server.tasks.store import TaskStore

TICKET = "flux_redux.ticket"
MOST_AT_ONCE = 64  # workers that can be woken at a time; the others wake by their slow poll
EVERY_S = 3.0  # from one look for lost tickets to the next
PATIENCE_S = 3.0  # how long a task may wait before its ticket counts as lost
_TURN = "tickets"
_PAUSE_S = 2.0  # after a broker that did not answer
_CONNECT_S = 4.0
_REDIS = {
    # How long Redis waits before it hands out again what a dead worker had: kombu's defaults make
    # that a minute and a half.
    "visibility_timeout": 60,
    "unacked_restore_interval": 3,
    "unacked_restore_throttle": 1,
    "socket_connect_timeout": _CONNECT_S,
    "socket_timeout": 30.0,
}
_AMQP = {"confirm_publish": True, "confirm_timeout": _CONNECT_S}
_log = structlog.get_logger("redux_server.dispatch.celery")


def queue_name(secret: bytes) -> str:
    """The queue of all who share ``secret``, so that two servers can share a broker."""
    digest = hashlib.sha256(b"tickets/" + secret).hexdigest()
    return f"flux-redux-tickets-{digest[:12]}"


def ticket_app(broker_url: str, queue: str) -> Celery:
    """Celery, set up to carry tickets in ``queue`` and nothing else."""
    app = Celery("flux-redux", broker=broker_url, set_as_current=False)
    is_amqp = broker_url.startswith("amqp")
    arguments: dict[str, Any] = {}
    if is_amqp:
        # Beyond that many, the oldest are dropped: no fleet of workers needs more to be woken.
        arguments = {"x-queue-type": "quorum", "x-max-length": 10_000}
    options = _AMQP if is_amqp else _REDIS if broker_url.startswith("redis") else {}
    app.conf.update(
        task_queues=[Queue(queue, Exchange(""), routing_key=queue, queue_arguments=arguments)],
        task_default_queue=queue,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_timeout=_CONNECT_S,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_heartbeat=10,
        broker_transport_options=options,
    )
    return app


def send_ticket(app: Celery, *, passed_on: int = 0) -> None:
    """Publish one; raises what kombu raises after a few quick tries."""
    app.send_task(
        TICKET,
        args=(passed_on,),
        queue=app.conf.task_default_queue,
        retry=True,
        retry_policy={"max_retries": 2, "interval_start": 0.1, "interval_step": 0.2},
    )


def waiting_tickets(app: Celery) -> int:
    """How many lie in the queue, which is made if there is none."""
    [queue] = app.conf.task_queues
    with app.connection_for_write() as connection, connection.channel() as channel:
        return int(queue(channel).queue_declare().message_count)


# --- Publishing -----------------------------------------------------------------------------------


class TicketQueue(Protocol):
    """Where tickets are published."""

    def send(self) -> None:
        """Publish one."""
        ...

    def waiting(self) -> int:
        """How many nobody has fetched yet."""
        ...


class CeleryTicketQueue:
    """The queue of a broker that Celery knows."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        waiting_tickets(app)  # makes the queue, should no worker have been there yet

    def send(self) -> None:
        """Publish one."""
        send_ticket(self._app)

    def waiting(self) -> int:
        """How many nobody has fetched yet."""
        return waiting_tickets(self._app)


class TicketPublisher:
    """Publishes tickets from a thread of its own, so that no request waits for a broker.

    What is asked for while the broker is away is dropped, not gathered: when it is back, the
    reconciler asks for as many tickets as are needed then.
    """

    def __init__(self, open_queue: Callable[[], TicketQueue]) -> None:
        self._open_queue = open_queue
        self._condition = threading.Condition()
        self._wanted = 0
        self._at_least = 0
        self._is_closing = False
        self._is_away = False
        self._thread = threading.Thread(target=self._run, name="tickets", daemon=True)

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def add(self) -> None:
        """Ask for one more ticket. Never blocks for longer than it takes to count."""
        with self._condition:
            self._wanted = min(MOST_AT_ONCE, self._wanted + 1)
            self._condition.notify()

    def fill_up_to(self, count: int) -> None:
        """Ask for as many tickets as there are missing to ``count`` in the queue."""
        with self._condition:
            self._at_least = min(MOST_AT_ONCE, max(self._at_least, count))
            self._condition.notify()

    def close(self, *, patience_s: float = 2.0) -> None:
        """Publish what was asked for, if that takes no longer than ``patience_s``, and end."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join(patience_s)

    def _run(self) -> None:
        queue: TicketQueue | None = None
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._wanted or self._at_least or self._is_closing)
                wanted, at_least = self._wanted, self._at_least
                self._wanted = self._at_least = 0
                if self._is_closing and not wanted:
                    return
            try:
                queue = queue or self._open_queue()
                self._publish(queue, wanted, at_least)
            except Exception as error:  # whatever a broker's client raises: that is not our end
                metrics.TICKETS.labels("failed").inc(max(wanted, 1))
                self._say_away(error)
                with self._condition:
                    self._condition.wait_for(lambda: self._is_closing, _PAUSE_S)

    def _publish(self, queue: TicketQueue, wanted: int, at_least: int) -> None:
        missing = at_least - queue.waiting() if at_least else 0
        for _ in range(max(wanted, missing)):
            queue.send()
            metrics.TICKETS.labels("sent").inc()
        if self._is_away:
            self._is_away = False
            _log.info("the broker is back")

    def _say_away(self, error: Exception) -> None:
        if not self._is_away:  # once, not at every ticket
            self._is_away = True
            reason = f"{type(error).__name__}: {error}"
            _log.warning("the broker is away; workers find tasks by polling", reason=reason)


# --- Replacing what was lost ----------------------------------------------------------------------


class Turns:
    """Turns at work that one of all the processes of a database does now and then.

    Whoever asks first has the turn, for as long as it says.
    """

    def __init__(self, database: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def take(self, name: str, *, every_s: float) -> bool:
        """Whether the caller is to do ``name`` now; nobody else is told so for ``every_s``."""
        now = self._clock()
        done_at = tables.turns.c.done_at
        # A date in the future was written before a clock was set back.
        is_due = or_(done_at <= now - every_s, done_at > now + every_s)
        try:
            with self._database.begin() as db:
                mine = tables.turns.c.name == name
                taken = db.execute(update(tables.turns).where(mine, is_due).values(done_at=now))
                if taken.rowcount:
                    return True
                is_known = db.scalar(tables.turns.select().where(mine)) is not None
                if not is_known:
                    db.execute(insert(tables.turns), {"name": name, "done_at": now})
                return not is_known
        except IntegrityError:  # another process was first to note it
            return False


class Reconciler:
    """Replaces tickets that were lost: asks the database what should have been claimed by now.

    Runs in every API node; they take turns, so that their number does not multiply the tickets.
    ``fill_up_to`` makes sure of so many tickets in the queue, those that are there counted.
    """

    def __init__(
        self,
        store: TaskStore,
        presence: Presence,
        turns: Turns,
        fill_up_to: Callable[[int], None],
    ) -> None:
        self._store = store
        self._presence = presence
        self._turns = turns
        self._fill_up_to = fill_up_to

    def tick(self) -> int:
        """Ask for tickets where they are missing; returns for how many tasks."""
        if not self._turns.take(_TURN, every_s=EVERY_S):
            return 0
        ready = [each for each in self._presence.all() if each.state is WorkerState.READY]
        alive = {each.fingerprint for each in ready}
        # Tickets for what none of them may take would wake them in vain, again and again.
        wanted = served(alive, alive, self._store.bound()) if ready else ()
        due = self._store.due(waiting_s=PATIENCE_S, limit=MOST_AT_ONCE, accepted_for=wanted)
        if due:
            # A ticket more than there are workers wakes nobody.
            self._fill_up_to(min(due, max(1, len(ready))))
        return due


class CeleryDispatch:
    """Wakes workers by tickets through a broker."""

    failure = ""  # its workers are on other machines

    def __init__(self, publisher: TicketPublisher, reconciler: Reconciler) -> None:
        self._publisher = publisher
        self._reconciler = reconciler
        self._reconciling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to publish, and to look after what was published."""
        self._publisher.start()
        self._reconciling = asyncio.create_task(self._reconcile_forever())

    def wake(self) -> None:
        """Publish a ticket soon; nothing is waited for."""
        self._publisher.add()

    async def stop(self) -> None:
        """Publish the last tickets. The workers go on: they are not ours."""
        if self._reconciling is not None:
            self._reconciling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reconciling
        await asyncio.to_thread(self._publisher.close)

    async def _reconcile_forever(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._reconciler.tick)
            except Exception as error:  # the database may be away; it may be back next time
                _log.error("could not look for forgotten tasks", exc_info=error)
            await asyncio.sleep(EVERY_S)
