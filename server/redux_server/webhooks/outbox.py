"""The outbox of webhooks: what is to be delivered, when, and how that ended.

A row is written with its task's end, in one transaction. A delivery is claimed by a fenced update
that counts the try and moves ``next_at`` to where the claim runs out: of several API nodes one
makes a try, and a try that was cut short by a crash is made again. Knows no HTTP.
"""

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, case, delete, func, not_, select, update

from redux_server.database.connection import reader
from redux_server.database.tables import webhooks
from redux_server.webhooks.callback import Callback

MAX_TRIES = 11
_FIRST_PAUSE_S = 10.0
_GROWTH = 4.0
_LONGEST_PAUSE_S = 6 * 3600.0
_JITTER = 0.25
_CLOCKS_DIFFER_S = 30.0  # by no more than that, among nodes
# Not IS NOT NULL, for which SQLite reads the whole table instead of the index.
_IS_OPEN = webhooks.c.next_at >= 0
_jitter = random.Random()  # the global one is for whoever seeds it


def retry_pause_s(tries: int, rng: Callable[[], float] = _jitter.random) -> float | None:
    """Seconds from a failed try to the next one, or None when there shall be none.

    10 s, 40 s, ... four times longer each, up to 6 h: 11 tries over 28 h. Up to a quarter is
    added at random (``rng`` gives 0 to 1), so that what failed together is not tried together.

    Args:
        tries: how many were made, 1 or more.
        rng: source of the jitter.
    """
    if tries >= MAX_TRIES:
        return None
    pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * _GROWTH ** (tries - 1))
    return pause_s * (1 + _JITTER * rng())


@dataclass(frozen=True, slots=True)
class Delivery:
    """A row of the outbox; ``tries`` counts those begun and fences what is written of one."""

    task_id: str
    key_id: str
    callback: Callback
    tries: int


class Outbox:
    """Webhooks in a SQL database. Every method is one transaction, for any thread.

    Args:
        database: the database.
        hold_s: seconds after which a claimed try counts as cut short; more than a try may take.
        clock: gives Unix seconds.
    """

    def __init__(
        self, database: Engine, *, hold_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._reader = reader(database)
        self._hold_s = hold_s
        self._clock = clock

    def due(
        self,
        limit: int,
        *,
        but_not_to: Collection[str] = (),
        but_not_of: Collection[str] = (),
    ) -> list[Delivery]:
        """At most ``limit`` deliveries whose time has come, the longest due first.

        ``but_not_to`` are origins (``https://host:port``), ``but_not_of`` ids of keys.
        """
        query = (
            select(webhooks.c.task_id, webhooks.c.key_id, webhooks.c.url, webhooks.c.tries)
            .where(webhooks.c.next_at <= self._clock())
            .where(webhooks.c.key_id.not_in(but_not_of))
            .order_by(webhooks.c.next_at)
            .limit(limit)
        )
        for origin in but_not_to:
            query = query.where(not_(webhooks.c.url.startswith(f"{origin}/", autoescape=True)))
        with self._reader.connect() as db:
            return [
                Delivery(row.task_id, row.key_id, Callback.parse(row.url), row.tries)
                for row in db.execute(query)
            ]

    def catch_up(self) -> int:
        """Make due what waits for longer than any try has it wait; returns how many.

        Such a time was written by a clock that was ahead and has been set back since.
        """
        now = self._clock()
        longest = {tries: self._longest_wait_s(tries) for tries in range(MAX_TRIES)}
        bound = case(longest, value=webhooks.c.tries, else_=self._longest_wait_s(MAX_TRIES - 1))
        least = min(longest.values())  # for the index
        ahead = webhooks.c.next_at > now + least, webhooks.c.next_at > now + bound
        with self._database.begin() as db:
            return int(db.execute(update(webhooks).where(*ahead).values(next_at=now)).rowcount)

    def _longest_wait_s(self, tries: int) -> float:
        pause_s = retry_pause_s(tries, lambda: 1.0) if tries else 0.0
        return max(self._hold_s, pause_s or 0.0) + _CLOCKS_DIFFER_S

    def claim(self, found: Sequence[Delivery]) -> list[Delivery]:
        """Begin a try of each; those that another node was faster with are left out."""
        claimed = []
        with self._database.begin() as db:
            until = self._clock() + self._hold_s
            for one in found:
                changed = db.execute(
                    update(webhooks)
                    .where(webhooks.c.task_id == one.task_id, webhooks.c.tries == one.tries)
                    .where(_IS_OPEN)
                    .values(next_at=until, tries=one.tries + 1)
                )
                if changed.rowcount:
                    claimed.append(Delivery(one.task_id, one.key_id, one.callback, one.tries + 1))
        return claimed

    def delivered(self, delivery: Delivery) -> bool:
        """Record success. It counts even if the try was taken for cut short meanwhile."""
        now = self._clock()
        return self._write(delivery.task_id, next_at=None, delivered_at=now, error="")

    def retry(self, delivery: Delivery, pause_s: float, error: str) -> bool:
        """Record a failed try; the next one is due in ``pause_s`` seconds."""
        next_at = self._clock() + pause_s
        return self._write(delivery.task_id, tries=delivery.tries, next_at=next_at, error=error)

    def give_up(self, delivery: Delivery, error: str) -> bool:
        """Record that the last try failed."""
        return self._write(delivery.task_id, tries=delivery.tries, next_at=None, error=error)

    def drop(self, delivery: Delivery) -> None:
        """Forget a delivery whose task was deleted, if that did not forget it already."""
        with self._database.begin() as db:
            db.execute(delete(webhooks).where(webhooks.c.task_id == delivery.task_id, _IS_OPEN))

    def count_open(self) -> int:
        """How many deliveries have not ended."""
        with self._reader.connect() as db:
            return int(db.scalar(select(func.count()).where(_IS_OPEN)) or 0)

    def _write(
        self, task_id: str, *, tries: int | None = None, **values: float | str | None
    ) -> bool:
        mine = [webhooks.c.task_id == task_id, _IS_OPEN]
        if tries is not None:
            mine.append(webhooks.c.tries == tries)
        with self._database.begin() as db:
            return bool(db.execute(update(webhooks).where(*mine).values(**values)).rowcount)
