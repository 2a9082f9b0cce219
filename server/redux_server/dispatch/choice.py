"""Which way to dispatch tasks ``--dispatch`` means, and what each needs before it can be built."""

from importlib.util import find_spec
from typing import Protocol
from urllib.parse import urlsplit

from sqlalchemy import Engine

from redux_server.database.clock import clock_of
from redux_server.database.connection import parse
from redux_server.dispatch.local import LocalWorkers
from redux_server.dispatch.presence import Presence
from redux_server.metrics import WorkerReports
from redux_server.settings import ServerSettings, UsageError
from redux_server.storage.signing import signing_secret
from redux_server.tasks.store import TaskStore

_BROKERS = ("amqp", "amqps", "redis", "rediss", "sqs")


class Dispatch(Protocol):
    """What gets accepted tasks to workers.

    ``failure`` is why none of its workers will ever take one; empty while that may be.
    """

    @property
    def failure(self) -> str:
        """Why the server can do nothing but end."""
        ...

    async def start(self) -> None:
        """Start the workers, if they are ours."""
        ...

    async def stop(self) -> None:
        """Let the workers finish what they hold, then end them; may be called again."""
        ...

    def wake(self) -> None:
        """Say that there is work; may be called often and never blocks."""
        ...


class NoDispatch:
    """Does nothing: workers look into the database by themselves, twice a second."""

    failure = ""

    async def start(self) -> None:
        """There is nothing to start."""

    async def stop(self) -> None:
        """There is nothing to stop; the workers are not ours."""

    def wake(self) -> None:
        """Nobody can be told."""


def check_dispatch(settings: ServerSettings) -> None:
    """Find what ``--dispatch`` lacks.

    Raises:
        UsageError: a database that other machines cannot reach, no broker, or no Celery.
    """
    if settings.dispatch == "local":
        return
    if parse(settings.database).get_backend_name() == "sqlite":
        raise UsageError(
            f"--dispatch {settings.dispatch} has its workers on other machines, which cannot share "
            "a SQLite file; give --database-url postgresql://USER:PASSWORD@HOST/NAME"
        )
    if settings.dispatch == "celery":
        _check_broker(settings.broker_url)


def _check_broker(url: str) -> None:
    scheme = urlsplit(url).scheme if url else ""
    if scheme not in _BROKERS:
        given = f"one that begins with {scheme!r}" if url else "none"
        raise UsageError(
            f"--dispatch celery needs --broker-url, and {given} was given; it is "
            "amqp://USER:PASSWORD@HOST:PORT/VHOST (RabbitMQ), redis://HOST or sqs://"
        )
    if find_spec("celery") is None:
        raise UsageError(
            "--dispatch celery needs Celery, which is not installed; "
            "run `pip install -c constraints.txt '.[cluster]'` in the project's folder"
        )


def build_dispatch(
    settings: ServerSettings,
    database: Engine,
    store: TaskStore,
    presence: Presence,
    reports: WorkerReports,
) -> Dispatch:
    """What the API process dispatches by. Celery is loaded only where it is used."""
    if settings.dispatch == "local":
        return LocalWorkers(settings, store, presence, reports)
    if settings.dispatch == "sql":
        return NoDispatch()
    from redux_server.dispatch.celery import (
        CeleryDispatch,
        CeleryTicketQueue,
        Reconciler,
        TicketPublisher,
        Turns,
        queue_name,
        ticket_app,
    )

    app = ticket_app(settings.broker_url, queue_name(signing_secret(database)))
    publisher = TicketPublisher(lambda: CeleryTicketQueue(app))
    turns = Turns(database, clock=clock_of(database))
    return CeleryDispatch(publisher, Reconciler(store, presence, turns, publisher.fill_up_to))
