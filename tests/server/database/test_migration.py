"""Tables made by an earlier version, brought up to date on either database."""

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from e2e.services import new_postgres_database
from redux_server.cli import main
from redux_server.database.connection import DatabaseUnusable, connect
from redux_server.database.migration import (
    SCHEMA_VERSION,
    open_database,
    revisions,
    schema_version,
    upgrade_database,
    version,
)
from redux_server.database.tables import metadata
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Outcome, Status

# What the first version's `metadata.create_all` sent to SQLite, and that it names no version.
FIRST_TABLES = """
CREATE TABLE tasks (
    id VARCHAR(32) NOT NULL, key_id VARCHAR(64) NOT NULL, model VARCHAR(128) NOT NULL,
    status VARCHAR(16) NOT NULL, input JSON NOT NULL, request_id VARCHAR(128) NOT NULL,
    created_at FLOAT NOT NULL, queued_at FLOAT, lease_until FLOAT, started_at FLOAT,
    finished_at FLOAT, owner VARCHAR(128), attempt INTEGER NOT NULL, crashes INTEGER NOT NULL,
    progress_step INTEGER NOT NULL, outcome JSON, PRIMARY KEY (id)
);
CREATE INDEX tasks_queued ON tasks (queued_at);
CREATE INDEX tasks_leased ON tasks (lease_until);
CREATE INDEX tasks_finished ON tasks (finished_at);
CREATE TABLE keys (
    id VARCHAR(64) NOT NULL, name VARCHAR(128) NOT NULL, digest VARCHAR(64) NOT NULL,
    created_at FLOAT NOT NULL, revoked_at FLOAT, PRIMARY KEY (id), UNIQUE (digest)
);
CREATE TABLE workers (
    id VARCHAR(128) NOT NULL, device VARCHAR(32) NOT NULL, state VARCHAR(16) NOT NULL,
    detail TEXT NOT NULL, heartbeat_at FLOAT NOT NULL, PRIMARY KEY (id)
);
CREATE TABLE secrets (name VARCHAR(64) NOT NULL, value VARCHAR(128) NOT NULL, PRIMARY KEY (name));
"""
FIRST_ROWS = """
INSERT INTO tasks VALUES ('w', 'k', 'm', 'created', '{"prompt": "a"}', 'r', 5.0, 5.0, NULL, NULL,
    NULL, NULL, 0, 0, 0, NULL);
INSERT INTO tasks VALUES ('e', 'k', 'm', 'failed', '{}', 'r', 1.0, NULL, NULL, 2.0, 3.0, 'o', 1, 0,
    4, '{"status": "failed", "outputs": [], "has_nsfw_contents": [], "seeds": [], "timings": {},
    "quality": "", "reused_steps": 0, "code": 1403, "error": "no"}');
INSERT INTO keys VALUES ('k', 'me', 'd', 1.0, NULL);
INSERT INTO secrets VALUES ('file-urls', '00ff');
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.cluster)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind by turns."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'tasks.db'}"
    else:
        with new_postgres_database(is_fast=True) as made:
            yield made


@pytest.fixture
def old_url(url: str) -> str:
    """The same with the first version's tables and rows in them."""
    fill(url)
    return url


def fill(url: str) -> None:
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as db:
            db.executescript(FIRST_TABLES + FIRST_ROWS)
        db.close()
        return
    statements = [s for s in (FIRST_TABLES + FIRST_ROWS).split(";\n") if s.strip()]
    run(url, lambda db: [db.execute(text(s.replace(": ", "\\: "))) for s in statements])


def run(url: str, action: Callable[[Connection], Any]) -> Any:
    engine = connect(url)
    try:
        with engine.begin() as db:
            return action(db)
    finally:
        engine.dispose()


def differences(db: Connection) -> list[Any]:
    """What alembic would still have to change to make the tables what the code says."""
    context = MigrationContext.configure(
        db,
        opts={
            "compare_type": True,
            "compare_server_default": _defaults_differ,
            "include_name": lambda name, kind, _: kind != "table" or name != version.name,
        },
    )
    return list(compare_metadata(context, metadata))


def _defaults_differ(*given: Any) -> bool:
    # Alembic's own comparison takes '' for a change: databases say ('') or ''::character varying.
    found, wanted = ((each or "").split("::")[0].strip("'()") for each in (given[3], given[5]))
    return found != wanted


def test_the_code_names_the_newest_revision() -> None:
    assert revisions()[-1] == SCHEMA_VERSION
    assert revisions() == sorted(revisions())


@pytest.mark.parametrize("start", ["", "0001"], ids=["empty", "old"])
def test_upgraded_tables_are_those_of_the_code(start: str, url: str) -> None:
    if start:
        fill(url)
    engine = connect(url)
    assert upgrade_database(engine) == (start, SCHEMA_VERSION)
    assert upgrade_database(engine) == (SCHEMA_VERSION, SCHEMA_VERSION)
    engine.dispose()
    assert run(url, differences) == []


def test_new_sqlite_tables_are_those_of_the_revisions(tmp_path: Path) -> None:
    made, upgraded = (f"sqlite:///{tmp_path / name}" for name in ("made.db", "upgraded.db"))
    open_database(made).dispose()
    engine = connect(upgraded)
    upgrade_database(engine)
    engine.dispose()

    def tables(db: Connection) -> dict[str, Any]:
        found = inspect(db)
        return {
            name: (
                sorted((c["name"], str(c["type"]), c["nullable"]) for c in found.get_columns(name)),
                sorted(
                    (i["name"], i["column_names"], str(i["dialect_options"].get("sqlite_where")))
                    for i in found.get_indexes(name)
                ),
                found.get_pk_constraint(name)["constrained_columns"],
            )
            for name in found.get_table_names()
        }

    assert run(made, tables) == run(upgraded, tables)
    assert run(made, differences) == []


@pytest.mark.cluster
def test_upgraded_postgresql_indexes_the_rows_that_the_code_says() -> None:
    """Alembic's comparison does not look at an index's condition."""
    indexes = text("SELECT indexdef FROM pg_indexes WHERE tablename = 'tasks' ORDER BY 1")
    found = []
    for make in (metadata.create_all, upgrade_database):
        with new_postgres_database(is_fast=True) as made:
            engine = connect(made)
            make(engine)
            with engine.connect() as db:
                found.append(list(db.scalars(indexes)))
            engine.dispose()
    assert found[0] == found[1]
    assert sum(" WHERE " in each for each in found[0]) == 5


def test_differences_would_be_found(url: str) -> None:
    engine = connect(url)
    upgrade_database(engine)
    engine.dispose()
    run(url, lambda db: db.execute(text("DROP INDEX tasks_queued")))
    run(url, lambda db: db.execute(text("ALTER TABLE keys DROP COLUMN revoked_at")))
    run(url, lambda db: db.execute(text("ALTER TABLE keys DROP COLUMN priority")))
    run(url, lambda db: db.execute(text("ALTER TABLE keys ADD priority INT DEFAULT 7 NOT NULL")))
    found = run(url, differences)
    kinds = sorted(str(each[0][0] if isinstance(each, list) else each[0]) for each in found)
    assert kinds == ["add_column", "add_index", "modify_default"]


def test_rows_of_an_old_database_are_kept_and_worked_on(old_url: str) -> None:
    engine = connect(old_url)
    upgrade_database(engine)
    store = TaskStore(engine)
    waiting, ended = store.get(["w", "e"])
    assert waiting and waiting.input == {"prompt": "a"} and waiting.status is Status.CREATED
    assert ended and ended.outcome == Outcome.failure(1403, "no")
    assert [task.id for task in store.claim("x")] == ["w"]
    assert store.finish("w", 1, Outcome(status=Status.COMPLETED))
    assert run(old_url, lambda db: db.scalar(text("SELECT value FROM secrets"))) == "00ff"
    engine.dispose()


def test_an_old_sqlite_database_is_brought_up_to_date_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "tasks.db"
    with sqlite3.connect(path) as db:
        db.executescript(FIRST_TABLES + FIRST_ROWS)
    db.close()
    urls = [f"sqlite:///{path}"] * 4
    with ThreadPoolExecutor(4) as pool:  # API and workers start together
        engines = list(pool.map(open_database, urls))
    assert {schema_version(engine) for engine in engines} == {SCHEMA_VERSION}
    [task] = TaskStore(engines[0]).get(["w"])
    assert task is not None
    for engine in engines:
        engine.dispose()
    assert run(urls[0], differences) == []


def test_a_failed_upgrade_leaves_everything_as_it_was(
    old_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_the_end(*given: Any) -> None:
        upgrade(*given)
        raise RuntimeError("power cut")

    upgrade = command.upgrade
    monkeypatch.setattr(command, "upgrade", fail_at_the_end)
    engine = connect(old_url)
    with pytest.raises(RuntimeError, match="power cut"):
        upgrade_database(engine)
    assert schema_version(engine) == "0001"
    names = {column["name"] for column in inspect(engine).get_columns("tasks")}
    assert "priority" not in names
    engine.dispose()


@pytest.mark.cluster
def test_several_upgrades_at_once_do_it_once() -> None:
    with new_postgres_database(is_fast=True) as made:
        engines = [connect(made) for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(upgrade_database, engines))
        assert sorted(before for before, _ in results) == ["", SCHEMA_VERSION, SCHEMA_VERSION]
        for engine in engines:
            engine.dispose()


# --- what a start says ---------------------------------------------------------------------------


def _stop_at(db: Connection, revision: str) -> None:
    db.execute(text(f"UPDATE alembic_version SET version_num = '{revision}'"))


@pytest.mark.cluster
@pytest.mark.parametrize("given", ["none", "old"])
def test_postgresql_that_is_behind_is_refused_with_the_command_to_run(given: str) -> None:
    with new_postgres_database(is_fast=True) as made:
        if given == "old":
            statements = [s for s in FIRST_TABLES.split(";\n") if s.strip()]
            run(made, lambda db: [db.execute(text(s)) for s in statements])
        with pytest.raises(DatabaseUnusable, match="flux-redux db upgrade") as caught:
            open_database(made)
        assert ("no tables yet" if given == "none" else "version 0001") in str(caught.value)


def test_a_database_of_a_later_version_is_refused(url: str) -> None:
    engine = connect(url)
    upgrade_database(engine)
    run(url, lambda db: _stop_at(db, "0999"))
    for action in (lambda: open_database(url), lambda: upgrade_database(engine)):
        with pytest.raises(DatabaseUnusable, match="0999, newer than"):
            action()
    engine.dispose()


def test_db_verbs_tell_and_upgrade(old_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--database-url", old_url]
    assert main.run(["db", "current", *where]) == 1
    assert f": 0001 (this flux-redux: {SCHEMA_VERSION})" in capsys.readouterr().out
    assert main.run(["db", "upgrade", *where]) == 0
    assert f"{SCHEMA_VERSION}, upgraded from 0001" in capsys.readouterr().out
    assert main.run(["db", "current", *where]) == 0
    assert main.run(["db", "upgrade", *where]) == 0
    assert "is up to date" in capsys.readouterr().out
    open_database(old_url).dispose()


def test_alembic_is_not_loaded_for_a_database_that_is_up_to_date(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    code = (
        "from redux_server.database.migration import open_database; import sys; "
        f"open_database({url!r}); print('alembic' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False\n"


def test_tables_that_say_their_version_and_lack_a_column_are_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    open_database(url).dispose()
    with contextlib.closing(sqlite3.connect(tmp_path / "tasks.db")) as db:
        db.execute("ALTER TABLE keys DROP COLUMN priority")
        db.commit()
    with pytest.raises(DatabaseUnusable, match=r"lacks keys\.priority; restore it from a backup"):
        open_database(url)
