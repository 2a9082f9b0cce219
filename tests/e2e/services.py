"""PostgreSQL, RabbitMQ and Redis for tests that need them: where they are, or why not.

They are looked for on loopback; a variable names another place. A test gets a database or a queue
of its own, which is gone afterwards.
"""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError

_POSTGRES = os.environ.get("TEST_POSTGRES_URL", "postgresql+psycopg://postgres@127.0.0.1/postgres")
_RABBITMQ = os.environ.get("TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672//")
_REDIS = os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379/9")


@contextmanager
def new_postgres_database(*, is_fast: bool = False) -> Iterator[str]:
    """The URL of a database made for this, without tables.

    With ``is_fast`` its commits do not wait for the disk: for tests of logic, not of durability.
    """
    _skip_without_postgres()
    name = f"flux_test_{os.getpid()}_{secrets.token_hex(3)}"
    try:
        _administer(f"CREATE DATABASE {name}")
        if is_fast:
            _administer(f"ALTER DATABASE {name} SET synchronous_commit = off")
        yield make_url(_POSTGRES).set(database=name).render_as_string(hide_password=False)
    finally:
        _administer(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def rabbitmq_url() -> str:
    """Where RabbitMQ answers; skips the test where none does."""
    return _broker("RabbitMQ", _RABBITMQ)


def redis_url() -> str:
    """Where Redis answers; skips the test where none does."""
    return _broker("Redis", _REDIS)


def _skip_without_postgres() -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip install '.[cluster]')")
    reason = _why_no_postgres()
    if reason:
        pytest.skip(f"no PostgreSQL that we may use at {_POSTGRES}: {reason}")


@cache
def _why_no_postgres() -> str:
    try:
        _administer("SELECT 1")
    except OperationalError as error:
        return str(error.orig).strip().split("\n")[0]
    return ""


def _administer(statement: str) -> None:
    engine = create_engine(
        _POSTGRES, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3}
    )
    try:
        with engine.connect() as db:
            db.execute(text(statement))
    finally:
        engine.dispose()


def _broker(name: str, url: str) -> str:
    pytest.importorskip("celery", reason="celery is not installed (pip install '.[cluster]')")
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), timeout=3).close()
    except OSError as error:
        pytest.skip(f"no {name} at {parts.hostname}:{parts.port}: {error}")
    return url
