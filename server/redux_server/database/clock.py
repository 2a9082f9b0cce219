"""What time it is for leases: the database's time where several machines share one.

A machine whose clock is an hour ahead would otherwise take every other machine's tasks away.
"""

import threading
import time
from collections.abc import Callable

from sqlalchemy import Engine, text

from redux_server.database.connection import is_sqlite, reader

_SYNC_EVERY_S = 60.0
_NOW = text("SELECT extract(epoch FROM clock_timestamp())")


def clock_of(database: Engine) -> Callable[[], float]:
    """Unix seconds: this machine's for SQLite, which no other can use, else the database's."""
    return time.time if is_sqlite(database) else DatabaseClock(database)


class DatabaseClock:
    """PostgreSQL's time, asked for once a minute and carried on by this machine's steady clock.

    ``steady`` counts seconds whatever the machine's date is set to; it is replaced in tests.
    """

    def __init__(self, database: Engine, *, steady: Callable[[], float] = time.monotonic) -> None:
        self._reader = reader(database)
        self._steady = steady
        self._syncing = threading.Lock()
        self._offset, self._synced_at = self._measure()

    def __call__(self) -> float:
        """Unix seconds."""
        is_old = self._steady() - self._synced_at > _SYNC_EVERY_S
        if is_old and self._syncing.acquire(blocking=False):
            try:
                self._offset, self._synced_at = self._measure()
            finally:
                self._syncing.release()
        return self._steady() + self._offset

    def _measure(self) -> tuple[float, float]:
        with self._reader.connect() as db:
            asked = self._steady()
            seconds = float(db.scalar(_NOW) or 0.0)
            answered = self._steady()
        return seconds - (asked + answered) / 2, answered
