"""Places in the queue, looked for before a submit costs anything.

The store counts for good, in the transaction that accepts (``redux_server.accepting``). What is
refused there has had its pictures decoded, flushed to the disk and deleted again, which is most of
its cost; so who would be refused is told here first. Knows no HTTP.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from redux_server.coalescer import Coalescer
from redux_server.tasks import KeyFull, QueueFull, Vacancy

Refusal = QueueFull | KeyFull


class Places:
    """Whether there is one for another task of a key; ``look`` says how many there are.

    Must be used from one event loop.
    """

    def __init__(self, look: Callable[[Sequence[str]], Sequence[Vacancy]]) -> None:
        self._look = Coalescer(look, name="places")
        self._taken_soon: Counter[str] = Counter()
        self._change = asyncio.Event()

    async def look(self, key_id: str) -> Refusal | None:
        """Why a task of this key would be refused now; None when it would be accepted."""
        return (await self._look(key_id)).refusal()

    @asynccontextmanager
    async def hold(self, key_id: str) -> AsyncIterator[Refusal | None]:
        """Keep a place for a task until it is accepted: ``look``, and that for the others too.

        Who finds only places that others hold waits for what becomes of them: to store pictures for
        one place many times over would cost more.
        """
        while (refusal := (found := await self._look(key_id)).refusal()) is None:
            others = self._taken_soon
            if others.total() < found.of_all and others[key_id] < found.of_key:
                break
            await self._change.wait()
        if refusal is not None:
            yield refusal
            return
        self._taken_soon[key_id] += 1
        try:
            yield None
        finally:
            self._taken_soon -= Counter({key_id: 1})  # leaves no zeros
            self._change.set()
            self._change = asyncio.Event()

    def close(self) -> None:
        """Stop the thread that looks."""
        self._look.close()
