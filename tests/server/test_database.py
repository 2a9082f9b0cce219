"""How writers share SQLite."""

import threading
from pathlib import Path

import pytest
from sqlalchemy import Engine, insert, select, text
from sqlalchemy.exc import OperationalError

from redux_server import database as module
from redux_server.database import open_database, reader, secrets


def test_writer_waits_for_the_one_before_it(database: Engine) -> None:
    has_lock, may_end = threading.Event(), threading.Event()

    def first() -> None:
        with database.begin() as db:
            has_lock.set()
            assert may_end.wait(10)
            db.execute(insert(secrets), {"name": "first", "value": ""})

    thread = threading.Thread(target=first)
    thread.start()
    assert has_lock.wait(10)
    threading.Timer(0.3, may_end.set).start()
    with database.begin() as db:  # begins only when the first has committed
        assert list(db.scalars(select(secrets.c.name))) == ["first"]
    thread.join()


def test_writer_gives_up_with_an_error_that_callers_know(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.1)
    with database.begin(), pytest.raises(OperationalError, match="locked"), database.begin():
        pass
    with database.begin() as db:  # and the connection is as good as before
        assert db.scalar(text("PRAGMA busy_timeout")) == 30_000


def test_reader_does_not_wait_for_a_writer(database: Engine) -> None:
    with database.begin() as db:
        db.execute(insert(secrets), {"name": "pending", "value": ""})
        with reader(database).connect() as other:
            assert list(other.scalars(select(secrets.c.name))) == []


def test_database_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError) as caught:
        open_database(f"sqlite:///{tmp_path / 'tasks.db'}")
    assert caught.value.filename == str(tmp_path / "tasks.db")
