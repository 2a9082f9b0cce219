"""How many bytes the tasks of each API key store: their rows, pictures sent inline, images made.

A ledger: every change is a row of its own, in the transaction that makes the change, so the sum is
exact and no transaction waits for another's row. Rows of a key are added up where tasks are
accepted, one transaction at a time. While a task is open, its images count as much as they may
take; at its end, what they took. Knows no files and begins no transaction.
"""

import json
import secrets
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from redux_server.database.tables import stored

FILE_BYTES = 16 * 2**10
"""What a file counts beside its bytes: its folder, its names, its row."""
TASK_BYTES = 4 * 2**10
"""What a task counts beside its parameters and its files: its rows and what finds them."""
_ROWS = 256  # of a key, beyond which they are added up


def row_bytes(parameters: Mapping[str, Any]) -> int:
    """What the row of a task with these parameters counts."""
    return TASK_BYTES + len(json.dumps(parameters))


def most_output_bytes(width: int, height: int, images: int) -> int:
    """The most that so many images of these sides (pixels) take: three bytes a pixel."""
    return images * (3 * width * height + FILE_BYTES)


def note(db: Connection, changes: Mapping[str, int]) -> None:
    """Let what is stored grow or shrink by so many bytes for each API key."""
    rows = [
        {"id": secrets.token_hex(16), "key_id": key_id, "size_bytes": size}
        for key_id, size in changes.items()
        if size
    ]
    if rows:
        db.execute(insert(stored), rows)


def by_key(db: Connection, key_ids: Collection[str] | None = None) -> Counter[str]:
    """What is stored for each of ``key_ids``, or for every key."""
    query = select(stored.c.key_id, func.sum(stored.c.size_bytes)).group_by(stored.c.key_id)
    if key_ids is not None:
        query = query.where(stored.c.key_id.in_(key_ids))
    return Counter({key_id: int(size) for key_id, size in db.execute(query)})


def add_up(db: Connection, key_ids: Collection[str]) -> None:
    """Make one row of many. Belongs into a transaction that takes turns with others of its kind."""
    query = (
        select(stored.c.key_id)
        .where(stored.c.key_id.in_(key_ids))
        .group_by(stored.c.key_id)
        .having(func.count() > _ROWS)
    )
    for key_id in db.scalars(query).all():
        rows = delete(stored).where(stored.c.key_id == key_id).returning(stored.c.size_bytes)
        note(db, {key_id: sum(db.scalars(rows))})
