"""How many open tasks each API key has: counted by the database, so that it holds for all nodes."""

import sys
from collections import Counter
from collections.abc import Set

from sqlalchemy import Connection, func, select

from redux_server.database import tasks


class OpenByKey:
    """The open tasks of some keys within one transaction.

    Exact where transactions that accept take turns. A ``limit`` of 0 is none, and counts nothing.
    """

    def __init__(self, db: Connection, key_ids: Set[str], *, limit: int) -> None:
        self._limit = limit
        self._open: Counter[str] = Counter()
        if limit:
            query = (
                select(tasks.c.key_id, func.count())
                .where(tasks.c.finished_at.is_(None), tasks.c.key_id.in_(key_ids))
                .group_by(tasks.c.key_id)
            )
            self._open.update({key_id: count for key_id, count in db.execute(query)})

    def has_room(self, key_id: str) -> bool:
        """Whether ``key_id`` may have another open task."""
        return self.left(key_id) > 0

    def left(self, key_id: str) -> int:
        """How many open tasks more ``key_id`` may have."""
        return self._limit - self._open[key_id] if self._limit else sys.maxsize

    def add(self, key_id: str) -> None:
        """Count a task that was accepted in this transaction."""
        self._open[key_id] += 1
