"""What time it is: the database's time where several machines share one.

A machine whose clock is an hour ahead would otherwise take every other machine's tasks away, and
one that is a week ahead would delete everything. ``ClockGuard`` tells whether the date itself can
be believed.
"""

import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy import Engine, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from redux_server.database.connection import is_sqlite, reader
from redux_server.database.tables import tasks, turns

_SYNC_EVERY_S = 60.0
_TRY_AGAIN_S = 5.0
MAX_JUMP_S = 24 * 3600.0
SETTLE_S = 3600.0
"""How long a date that has jumped has to go on before it is believed."""
_IS_CLOCK = turns.c.name == "clock"  # when it was when the date was last believed
_NOW = text("SELECT extract(epoch FROM clock_timestamp())")
_log = structlog.get_logger("redux_server.database.clock")


def steady_clock() -> float:
    """Seconds that pass whatever the date is set to, also while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def clock_of(database: Engine) -> Callable[[], float]:
    """Unix seconds: this machine's for SQLite, which no other can use, else the database's."""
    return time.time if is_sqlite(database) else DatabaseClock(database)


class DatabaseClock:
    """PostgreSQL's time, asked for once a minute and carried on by this machine's steady clock.

    Once it is made a call waits for nothing: the database is asked beside it, and while that is
    away the time goes on. ``steady`` counts seconds whatever the machine's date is set to; it and
    ``beside``, which runs a function in another thread, are replaced in tests.
    """

    def __init__(
        self,
        database: Engine,
        *,
        steady: Callable[[], float] = steady_clock,
        beside: Callable[[Callable[[], None]], None] = lambda function: threading.Thread(
            target=function, name="clock", daemon=True
        ).start(),
    ) -> None:
        self._reader = reader(database)
        self._steady = steady
        self._beside = beside
        self._syncing = threading.Lock()
        self._offset = self._measure()
        self._ask_at = steady() + _SYNC_EVERY_S

    def __call__(self) -> float:
        """Unix seconds."""
        if self._steady() > self._ask_at and self._syncing.acquire(blocking=False):
            self._beside(self._sync)
        return self._steady() + self._offset

    def _sync(self) -> None:
        pause_s = _TRY_AGAIN_S
        try:
            self._offset = self._measure()
            pause_s = _SYNC_EVERY_S
        except SQLAlchemyError as error:  # it may be back next time
            _log.warning("cannot ask the database for the time", reason=type(error).__name__)
        finally:
            self._ask_at = self._steady() + pause_s
            self._syncing.release()

    def _measure(self) -> float:
        with self._reader.connect() as db:
            asked = self._steady()
            seconds = float(db.scalar(_NOW) or 0.0)
            answered = self._steady()
        return seconds - (asked + answered) / 2


class ClockGuard:
    """Whether the date may be believed by what deletes by age.

    A machine may start with any date, also the one that has the database. So the database keeps
    when it was when the date was last believed. One that is more than a day off is not, until it
    has gone on for ``SETTLE_S``: by then somebody has put it right, or the machine was only off.
    Used from one thread.
    """

    def __init__(
        self,
        database: Engine,
        *,
        clock: Callable[[], float],
        steady: Callable[[], float] = steady_clock,
    ) -> None:
        self._database = database
        self._clock = clock
        self._steady = steady
        self._doubted_at: tuple[float, float] | None = None  # date, steady seconds
        self.jump_s = 0.0
        """By how much the date is off from when it was last believed; 0 while it is."""

    def believes(self) -> bool:
        """Look at the date; whether what is old by it may be deleted."""
        now, steady = self._clock(), self._steady()
        jump_s = jump_since_believed(self._database, now)
        if abs(jump_s) <= MAX_JUMP_S:
            return self._believe(now)
        if self._doubted_at is None or self._has_jumped_again(now, steady):
            self._doubted_at = now, steady
        if steady - self._doubted_at[1] >= SETTLE_S:
            _log.warning("the date is believed now", jumped_by_days=round(jump_s / 86400, 1))
            return self._believe(now)
        self.jump_s = jump_s
        return False

    def _has_jumped_again(self, now: float, steady: float) -> bool:
        assert self._doubted_at is not None
        passed_s = now - self._doubted_at[0]
        return abs(passed_s - (steady - self._doubted_at[1])) > MAX_JUMP_S

    def _believe(self, now: float) -> bool:
        self._doubted_at, self.jump_s = None, 0.0
        try:
            with self._database.begin() as db:
                if not db.execute(update(turns).where(_IS_CLOCK).values(done_at=now)).rowcount:
                    db.execute(insert(turns), {"name": "clock", "done_at": now})
        except IntegrityError:  # another process was first
            pass
        return True


def jump_since_believed(database: Engine, now: float) -> float:
    """By how many seconds ``now`` is off from when the date was last believed.

    A database that does not know that yet has at least its newest task.
    """
    with reader(database).connect() as db:
        believed = db.scalar(select(turns.c.done_at).where(_IS_CLOCK))
        if believed is None:
            believed = db.scalar(select(func.max(tasks.c.created_at)))
    return 0.0 if believed is None else now - believed
