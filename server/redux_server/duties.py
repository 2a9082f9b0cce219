"""Work that one process of all does now and then: whoever asks first has it for that time."""

import time
from collections.abc import Callable

from sqlalchemy import Engine, insert, or_, update
from sqlalchemy.exc import IntegrityError

from redux_server.database import duties


class Duties:
    """Turns among the processes that share a database."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def take(self, name: str, *, every_s: float) -> bool:
        """Whether the caller is to do ``name`` now; nobody else is told so for ``every_s``."""
        now = self._clock()
        # A date in the future was written before a clock was set back.
        is_due = or_(duties.c.done_at <= now - every_s, duties.c.done_at > now + every_s)
        try:
            with self._engine.begin() as db:
                mine = duties.c.name == name
                taken = db.execute(update(duties).where(mine, is_due).values(done_at=now))
                if taken.rowcount:
                    return True
                is_known = db.scalar(duties.select().where(mine)) is not None
                if not is_known:
                    db.execute(insert(duties), {"name": name, "done_at": now})
                return not is_known
        except IntegrityError:  # another process was first to note it
            return False
