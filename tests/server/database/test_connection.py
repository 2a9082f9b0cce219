"""How writers share SQLite, which databases are taken, and what their errors tell."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, insert, select, text
from sqlalchemy.exc import IntegrityError, OperationalError

from e2e.live import free_port
from redux_server.database import connection as module
from redux_server.database.connection import (
    DATABASE_AWAY,
    DatabaseUnusable,
    WrongTables,
    parse,
    reader,
    shown,
)
from redux_server.database.migration import open_database
from redux_server.database.tables import keys, secrets
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Created, NewTask


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


def test_failed_statement_does_not_tell_its_values(database: Engine) -> None:
    """Its error is logged, and the values are prompts, URLs and digests."""
    row = {"id": "1", "name": "hush", "digest": "hush-digest", "created_at": 0.0}
    with pytest.raises(IntegrityError) as caught, database.begin() as db:
        db.execute(insert(keys), [row, row])
    assert "hush" not in str(caught.value) and "INSERT INTO keys" in str(caught.value)


# --- which database ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "tasks.db",
        "mysql://u:hunter2@host/db",
        "postgresql+asyncpg://u:hunter2@host/db",
        "postgresql://u:hunter2@host",
        "postgresql://u:p@hunter2@host/db",
        "postgresql://u:hunter2@host:port/db",
        "sqlite://",
        "sqlite:///:memory:",
    ],
)
def test_url_of_another_kind_is_refused_without_telling_its_password(url: str) -> None:
    with pytest.raises(DatabaseUnusable, match="--database-url must be sqlite:///FILE") as caught:
        open_database(url)
    assert "hunter2" not in str(caught.value)


def test_common_spellings_of_postgresql_mean_our_driver() -> None:
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        parsed = parse(f"{scheme}://u:p%40w@host:5/db?sslmode=require")
        assert (parsed.drivername, parsed.password) == ("postgresql+psycopg", "p@w")
        assert shown(parsed) == "postgresql+psycopg://u:***@host:5/db"


def test_database_that_does_not_answer_is_named_without_its_password() -> None:
    pytest.importorskip("psycopg")
    url = f"postgresql://u:hunter2@127.0.0.1:{free_port()}/db"
    with pytest.raises(DatabaseUnusable, match="check --database-url") as e:
        open_database(url)
    assert "hunter2" not in str(e.value)
    assert "refused" in str(e.value)


@pytest.mark.cluster
def test_waits_for_postgresql_have_an_end_and_a_url_may_set_its_own(postgres_url: str) -> None:
    def setting(url: str, name: str) -> str:
        engine = open_database(url)
        try:
            with engine.connect() as db:
                return str(db.scalar(text(f"SHOW {name}")))
        finally:
            engine.dispose()

    assert setting(postgres_url, "statement_timeout") == "20s"
    assert setting(postgres_url, "lock_timeout") == "10s"
    chosen = f"{postgres_url}?options=-cstatement_timeout%3D7s"
    assert setting(chosen, "statement_timeout") == "7s"


@pytest.mark.cluster
def test_a_connection_that_the_database_closed_is_replaced_unnoticed(postgres_url: str) -> None:
    engine = open_database(postgres_url)
    with engine.connect() as db:
        pid = db.scalar(text("SELECT pg_backend_pid()"))
    other = open_database(postgres_url)
    with other.connect() as db:
        assert db.scalar(select(func.pg_terminate_backend(pid)))
    assert TaskStore(engine).get(["unknown"]) == [None]
    for each in (engine, other):
        each.dispose()


@pytest.mark.cluster
def test_queue_bound_holds_when_several_api_nodes_accept_at_once(postgres_url: str) -> None:
    engines = [open_database(postgres_url) for _ in range(4)]
    with engines[0].begin() as db:
        db.execute(text("TRUNCATE tasks"))
    start = threading.Barrier(len(engines))

    def accept(engine: Engine) -> int:
        store = TaskStore(engine)
        start.wait()
        answers = [
            store.accept([NewTask("k", "m", {}) for _ in range(3)], max_open=50) for _ in range(10)
        ]
        return sum(isinstance(each, Created) for batch in answers for each in batch)

    with ThreadPoolExecutor(len(engines)) as pool:
        assert sum(pool.map(accept, engines)) == 50
    assert TaskStore(engines[0]).queue_state().waiting == 50
    for engine in engines:
        engine.dispose()


# --- Tables of another version --------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", ["ALTER TABLE turned RENAME COLUMN value TO other", "DROP TABLE turned"]
)
@pytest.mark.parametrize(
    "statement", ["SELECT value FROM turned", "INSERT INTO turned (value) VALUES (1)"]
)
def test_a_missing_table_or_column_is_no_database_that_is_away(
    either_database: Engine, change: str, statement: str
) -> None:
    with either_database.begin() as db:
        db.execute(text("DROP TABLE IF EXISTS turned"))
        db.execute(text("CREATE TABLE turned (value INTEGER)"))
        db.execute(text(change))
    for use in (either_database.begin, reader(either_database).connect):
        with pytest.raises(WrongTables, match="db upgrade") as caught, use() as db:
            db.execute(text(statement))
        assert not isinstance(caught.value, DATABASE_AWAY)
        assert "turned" in str(caught.value) or "value" in str(caught.value)
    with either_database.connect() as db:  # and the connection is as good as before
        assert db.scalar(text("SELECT 1")) == 1


def test_a_locked_database_is_away_and_not_of_another_version(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.1)
    with database.begin(), pytest.raises(DATABASE_AWAY), database.begin():
        pass


def test_sqlite_keeps_what_is_temporary_in_memory(database: Engine) -> None:
    """Sorting more than fits its cache would use the system's temporary folder."""
    with database.connect() as db:
        assert db.scalar(text("PRAGMA temp_store")) == 2
