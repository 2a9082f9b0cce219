"""What each way to dispatch needs, and that a broker which is away is no concern of a request."""

import asyncio
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from e2e.live import free_port
from redux_server.cli.serve import check
from redux_server.dispatch import choice
from redux_server.dispatch.choice import NoDispatch, build_dispatch, check_dispatch
from redux_server.dispatch.local import LocalWorkers
from redux_server.dispatch.presence import Presence
from redux_server.metrics import WorkerReports
from redux_server.settings import ServerSettings, UsageError
from redux_server.tasks.store import TaskStore

POSTGRES = "postgresql://flux:hunter2@db/flux"
RABBITMQ = "amqp://flux:hunter2@mq//"


def settings(**given: Any) -> ServerSettings:
    return ServerSettings(data_dir=Path("/nowhere"), model="fake", **given)


@pytest.mark.parametrize("way", ["sql", "celery"])
def test_workers_elsewhere_cannot_use_sqlite(way: str) -> None:
    for more in ({}, {"database_url": "sqlite:////srv/tasks.db"}):
        with pytest.raises(UsageError, match="cannot share a SQLite file"):
            check_dispatch(settings(dispatch=way, broker_url=RABBITMQ, **more))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "none was given"),
        ("mq:5672", "begins with 'mq'"),
        ("http://:hunter2@mq", "begins with 'http'"),
        ("sqla+sqlite:///hunter2.db", r"begins with 'sqla\+sqlite'"),
    ],
)
def test_celery_needs_a_broker_that_loses_nothing_by_itself(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"needs --broker-url.*{said}.*amqp://") as caught:
        check_dispatch(settings(dispatch="celery", database_url=POSTGRES, broker_url=url))
    assert "hunter2" not in str(caught.value)


def test_celery_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install -c constraints\.txt '\.\[cluster\]'"):
        check_dispatch(settings(dispatch="celery", database_url=POSTGRES, broker_url=RABBITMQ))


@pytest.mark.parametrize("broker", [RABBITMQ, "redis://mq/0", "rediss://mq", "sqs://", "amqps://m"])
def test_what_is_complete_passes(broker: str) -> None:
    if importlib.util.find_spec("celery") is None:
        pytest.skip("celery is not installed")
    check(settings(dispatch="celery", database_url=POSTGRES, broker_url=broker))
    check(settings(dispatch="sql", database_url=POSTGRES))
    check(settings())


def test_passwords_are_not_shown_with_the_settings() -> None:
    shown = repr(settings(dispatch="celery", database_url=POSTGRES, broker_url=RABBITMQ))
    assert "hunter2" not in shown


def test_each_engine_is_what_it_is_called(database: Engine) -> None:
    store, presence = TaskStore(database), Presence(database)
    local = build_dispatch(settings(), database, store, presence, WorkerReports())
    assert isinstance(local, LocalWorkers)
    sql = build_dispatch(settings(dispatch="sql"), database, store, presence, WorkerReports())
    assert isinstance(sql, NoDispatch)


def test_celery_is_not_loaded_before_it_is_used() -> None:
    code = "import redux_server.dispatch.choice, sys; print('celery' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False\n"


def test_a_broker_that_is_away_neither_fails_nor_delays_anything(database: Engine) -> None:
    pytest.importorskip("celery", reason="celery is not installed (pip install '.[cluster]')")
    from redux_server.dispatch.celery import Turns

    away = settings(dispatch="celery", broker_url=f"amqp://guest@127.0.0.1:{free_port()}//")
    store, presence = TaskStore(database), Presence(database)
    dispatch = build_dispatch(away, database, store, presence, WorkerReports())

    async def use() -> tuple[float, float]:
        await dispatch.start()
        began = time.monotonic()
        for _ in range(1000):
            dispatch.wake()
        await asyncio.sleep(0)
        woken_s = time.monotonic() - began
        await asyncio.sleep(1.0)  # it is refused meanwhile
        began = time.monotonic()
        await dispatch.stop()
        return woken_s, time.monotonic() - began

    woken_s, stopped_s = asyncio.run(use())
    assert woken_s < 1
    assert stopped_s < 10
    assert Turns(database).take("anything", every_s=1)
