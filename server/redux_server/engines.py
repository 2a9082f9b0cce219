"""Which engine ``--engine`` means, and what each needs before it can be built."""

from importlib.util import find_spec
from urllib.parse import urlsplit

from sqlalchemy import Engine as Database

from redux_server.blobs import signing_secret
from redux_server.database import parse
from redux_server.database_clock import clock_of
from redux_server.duties import Duties
from redux_server.engine import LocalEngine
from redux_server.polling_engine import PollingEngine
from redux_server.presence import Presence
from redux_server.services import Engine
from redux_server.settings import ServerSettings, SettingsError
from redux_server.store import TaskStore

_BROKERS = ("amqp", "amqps", "redis", "rediss", "sqs")


def check_engine(settings: ServerSettings) -> None:
    """Find what ``--engine`` lacks.

    Raises:
        SettingsError: a database that other machines cannot reach, no broker, or no Celery.
    """
    if settings.engine == "local":
        return
    if parse(settings.database).get_backend_name() == "sqlite":
        raise SettingsError(
            f"--engine {settings.engine} has its workers on other machines, which cannot share a "
            "SQLite file; give --database-url postgresql://USER:PASSWORD@HOST/NAME"
        )
    if settings.engine == "celery":
        _check_broker(settings.broker_url)


def _check_broker(url: str) -> None:
    scheme = urlsplit(url).scheme if url else ""
    if scheme not in _BROKERS:
        given = f"one that begins with {scheme!r}" if url else "none"
        raise SettingsError(
            f"--engine celery needs --broker-url, and {given} was given; it is "
            "amqp://USER:PASSWORD@HOST:PORT/VHOST (RabbitMQ), redis://HOST or sqs://"
        )
    if find_spec("celery") is None:
        raise SettingsError(
            "--engine celery needs Celery, which is not installed; "
            "run `pip install 'flux-redux-server[cluster]'`"
        )


def build_engine(
    settings: ServerSettings, database: Database, store: TaskStore, presence: Presence
) -> Engine:
    """The engine of an API process. Celery is loaded only where it is used."""
    if settings.engine == "local":
        return LocalEngine(settings, store, presence)
    if settings.engine == "sql":
        return PollingEngine()
    from redux_server.celery_engine import CeleryEngine, CeleryOffice
    from redux_server.reconciler import Reconciler
    from redux_server.ticket_publisher import TicketPublisher
    from redux_server.tickets import queue_name, ticket_app

    app = ticket_app(settings.broker_url, queue_name(signing_secret(database)))
    publisher = TicketPublisher(lambda: CeleryOffice(app))
    duties = Duties(database, clock=clock_of(database))
    return CeleryEngine(publisher, Reconciler(store, presence, duties, publisher.fill_up_to))
