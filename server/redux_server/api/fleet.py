"""The workers as the API knows them: whether any is ready, what they run, why they do not.

Every submit and every poll asks, so what the database says is kept for a moment. Workers may be on
other machines, with other settings than this process has: only what they say of themselves counts.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from redux_server.database.connection import DATABASE_AWAY
from redux_server.dispatch.fingerprint import ANY, described, served
from redux_server.dispatch.presence import Presence, WorkerState, WorkerStatus
from redux_server.tasks.task import Status, Task

EVERY_S = 1.0
_NOBODY = "a worker; none is ready"


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers at one moment."""

    workers: Sequence[WorkerStatus] = ()

    @property
    def ready(self) -> list[WorkerStatus]:
        """Those that take tasks."""
        return [each for each in self.workers if each.state is WorkerState.READY]

    @property
    def models(self) -> list[str]:
        """What they run, each once."""
        return sorted({each.model for each in self.ready if each.model})

    @property
    def fingerprint(self) -> str:
        """What a task is accepted for now; empty where nobody knows.

        Of workers that differ, as during an upgrade, what most of them run; where none is ready,
        what those run that were not heard of lately.
        """
        known = [each.fingerprint for each in self.ready or self.workers if each.fingerprint]
        counts = Counter(known)
        return max(counts, key=lambda each: (counts[each], each), default=ANY)

    @property
    def failure(self) -> str:
        """Why no task is worked on; empty if one is, or may be soon."""
        states = {each.state for each in self.workers}
        if WorkerState.FAILED not in states or states & {WorkerState.READY, WorkerState.LOADING}:
            return ""
        failed = [each for each in self.workers if each.state is WorkerState.FAILED]
        return "; ".join(dict.fromkeys(each.detail for each in failed))

    def unserved(self, bound: "dict[str, int]") -> "dict[str, int]":
        """Of the tasks that wait (see ``TaskStore.bound``), those that no ready worker takes."""
        taken = self._served(bound)
        return {each: count for each, count in bound.items() if each not in taken}

    def waiting_for(self, task: Task) -> str | None:
        """What a task waits for beside its turn; None if for nothing."""
        if task.status is not Status.CREATED:
            return None
        if not self.ready:
            failure = self.failure
            return f"a worker that can load its model: {failure}" if failure else _NOBODY
        if task.fingerprint in self._served([task.fingerprint]):
            return None
        return f"a worker with {described(task.fingerprint)}; those that are ready run others"

    def _served(self, bound: "Sequence[str] | dict[str, int]") -> frozenset[str]:
        alive = {each.fingerprint for each in self.ready}
        return served(alive, alive, list(bound)) if self.ready else frozenset()


@dataclass(slots=True)
class FleetWatch:
    """Reads the list of workers at most every ``every_s``. For one event loop."""

    presence: Presence
    every_s: float = EVERY_S
    clock: Callable[[], float] = time.monotonic
    last: Fleet = field(default_factory=Fleet)
    _read_at: float | None = None
    _reading: "asyncio.Task[None] | None" = None

    async def now(self) -> Fleet:
        """The workers, as of ``every_s`` ago at most while the database answers."""
        if self._read_at is None or self.clock() - self._read_at >= self.every_s:
            if self._reading is None:
                self._reading = asyncio.create_task(self._read())
            await asyncio.shield(self._reading)
        return self.last

    async def _read(self) -> None:
        try:
            self.last = Fleet(tuple(await asyncio.to_thread(self.presence.all)))
        except DATABASE_AWAY:
            pass  # what was known is better than nothing
        finally:
            self._read_at = self.clock()
            self._reading = None
