"""The distributed engine: tickets through a broker to workers on other machines."""

import asyncio
import contextlib

import structlog
from celery import Celery

from redux_server.reconciler import EVERY_S, Reconciler
from redux_server.ticket_publisher import TicketPublisher
from redux_server.tickets import send_ticket, waiting_tickets

_log = structlog.get_logger("redux_server.engine")


class CeleryEngine:
    """Wakes workers by tickets through a broker."""

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


class CeleryOffice:
    """Hands tickets in at a broker."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        waiting_tickets(app)  # makes the queue, should no worker have been there yet

    def send(self) -> None:
        """Publish one."""
        send_ticket(self._app)

    def waiting(self) -> int:
        """How many nobody has fetched yet."""
        return waiting_tickets(self._app)
