"""Rows of the database: tasks put straight into it, as many as a list needs, and counted."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, func, insert, select

from redux_server.database.tables import tasks
from redux_server.parameters import MODELS
from redux_server.tasks.rows import new_row
from redux_server.tasks.task import NewTask

NOON = 1_800_000_000.0
INPUT = {"num_inference_steps": 28, "num_images": 1}


def fill(
    engine: Engine,
    count: int,
    *,
    key_id: str = "k",
    at: Callable[[int], float] = lambda i: NOON + i,
    **values: Any,
) -> list[str]:
    """``count`` tasks, the first one the oldest; returns their ids."""
    rows = [
        {**new_row(NewTask(key_id, MODELS[0], INPUT), priority=0, now=at(i)), **values}
        for i in range(count)
    ]
    with engine.begin() as db:
        db.execute(insert(tasks), rows)
    return [row["id"] for row in rows]


def count_rows(engine: Engine, table: Any = tasks) -> int:
    with engine.connect() as db:
        return int(db.scalar(select(func.count()).select_from(table)) or 0)
