"""Callers in sync mode who give up and ask again: they are joined to the task that they left.

Some clients give up long before a task ends, and send their request again without saying so. What
is known of those who left lies in the database, for all API processes; here is only who waits at
this one, since a caller who returns may be faster than the news that he left.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.exc import IntegrityError

from redux_server.database.connection import DATABASE_AWAY
from redux_server.tasks.accepting import IdempotencyKeys
from redux_server.tasks.task import Task

SOON_S = 0.25
"""What an equal request waits for one that is held here, whose caller may be leaving."""


class Waiting:
    """One caller who waits for a task. ``leave`` says that he has gone."""

    def __init__(self) -> None:
        self.has_left = asyncio.Event()
        self.is_over = asyncio.Event()

    def leave(self) -> None:
        """Note that nobody waits any more."""
        self.has_left.set()


class Rejoining:
    """Who waits here, by API key and digest of the request. For use from one event loop."""

    def __init__(self, keys: IdempotencyKeys) -> None:
        self._keys = keys
        self._waiting: defaultdict[tuple[str, str], set[Waiting]] = defaultdict(set)

    @asynccontextmanager
    async def waiting(self, task: Task, digest: str) -> AsyncIterator[Waiting]:
        """A caller waits for ``task``; whether he left is stored when the context ends."""
        place = (task.key_id, digest)
        mine = Waiting()
        self._waiting[place].add(mine)
        try:
            yield mine
            if mine.has_left.is_set():
                with contextlib.suppress(*DATABASE_AWAY, IntegrityError):
                    await asyncio.to_thread(self._keys.leave, *place, task.id)
        finally:
            mine.is_over.set()
            self._waiting[place].discard(mine)
            if not self._waiting[place]:
                del self._waiting[place]

    async def task_left(self, key_id: str, digest: str) -> Task | None:
        """The task of an equal request whose caller left lately; each is given once."""
        here = list(self._waiting.get((key_id, digest), ()))
        if here:
            leaving = [asyncio.create_task(each.has_left.wait()) for each in here]
            await asyncio.wait(leaving, timeout=SOON_S, return_when=asyncio.FIRST_COMPLETED)
            for task in leaving:
                task.cancel()
            for each in here:
                if each.has_left.is_set():
                    await each.is_over.wait()
        return await asyncio.to_thread(self._keys.rejoin, key_id, digest)
