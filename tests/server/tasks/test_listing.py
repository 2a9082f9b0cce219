"""Pages of a key's tasks: found in one index, whatever the database."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from redux_server.database.connection import is_sqlite
from redux_server.tasks.listing import History, Wanted, page_ids
from redux_server.tasks.task import Status
from server.stored_tasks import NOON, fill


@pytest.fixture
def full(either_database: Engine) -> Iterator[Engine]:
    """A database with 3,000 tasks of one key among those of others."""
    engine = either_database
    ended = {"status": Status.COMPLETED, "queued_at": None}
    fill(engine, 3000, **ended)
    for number in range(10):
        fill(engine, 100, key_id=f"other{number}", **ended)
    if not is_sqlite(engine):
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            db.execute(text("VACUUM ANALYZE tasks"))
    yield engine


def test_pages_are_found_in_the_index_alone(full: Engine) -> None:
    asked = [Wanted("k"), Wanted("k", after=NOON + 5, before=NOON + 1500)]
    if is_sqlite(full):  # PostgreSQL knows how few failed, and of so few rows it reads the table
        asked.append(Wanted("k", status=Status.FAILED))
    for wanted in asked:
        statement = page_ids(wanted, number=2, size=50)
        compiled = str(statement.compile(full, compile_kwargs={"literal_binds": True}))
        how = "EXPLAIN QUERY PLAN" if is_sqlite(full) else "EXPLAIN"
        with full.connect() as db:
            plan = "\n".join(str(row) for row in db.exec_driver_sql(f"{how} {compiled}"))
        assert "tasks_listed" in plan, plan
        assert "TEMP B-TREE" not in plan and "Sort" not in plan, plan
        assert ("COVERING INDEX" if is_sqlite(full) else "Index Only Scan") in plan, plan
    history = History(full)
    assert history.count(Wanted("k")) == 3000
    last = history.page(Wanted("k"), number=30, size=100)
    assert [task.created_at for task in last] == [NOON + i for i in range(99, -1, -1)]
    first = history.page(Wanted("k"), number=1, size=1, oldest_first=True)
    assert first == last[-1:]
