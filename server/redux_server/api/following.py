"""Following tasks until they end: for streams, and for requests that are held (sync mode).

Workers may be processes or machines of their own, so what changes is looked for in the store: by
one look for all tasks that are followed, a few times a second. A subscription keeps nothing but
that its task has changed; whoever has it reads the task anew. So a slow reader holds no memory and
misses steps, never the end. Knows no HTTP.
"""

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog

from redux_server import metrics
from redux_server.database.connection import DATABASE_AWAY
from redux_server.tasks.store import Glance
from redux_server.tasks.task import Code, Task

EVERY_S = 0.2
KEYS_EVERY_S = 1.0  # how often keys are looked at; a revoked one is to end within 2 s
MAX_STREAMS, MAX_STREAMS_OF_A_KEY = 1000, 100
MAX_HELD, MAX_HELD_OF_A_KEY = 256, 128
NOT_LOOKED_AT = object()
_BATCH = 500  # ids in one statement
_STOPPING = "the server is about to stop"
# Clients look for the first words, and one sends its request again for others ("timeout").
_TOO_EARLY = "Sync mode timed out: {reason}. The task goes on; ask for it at urls.get."

_log = structlog.get_logger("redux_server.api.following")


class TooManySubscriptions(Exception):
    """There is no room for one more: of this key (``is_of_key``), or of anyone."""

    def __init__(self, *, is_of_key: bool) -> None:
        super().__init__()
        self.is_of_key = is_of_key


class KeyRevoked(Exception):
    """The API key of who waits was revoked meanwhile."""


class Subscription:
    """Someone who follows one task. ``seen`` is its last ``Glance``, None once there is no task.

    With ``is_revoked`` the API key is of no use any more, and there is nothing to tell its user.
    """

    def __init__(self, task_id: str, key_id: str) -> None:
        self.task_id = task_id
        self.key_id = key_id
        self.seen: object = NOT_LOOKED_AT
        self.is_revoked = False
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Say that there is something new."""
        self._changed.set()

    def revoke(self) -> None:
        """Say that the API key was revoked."""
        self.is_revoked = True
        self.wake()

    def look_again(self) -> None:
        """Have the next look that succeeds be news, whatever it finds."""
        self.seen = NOT_LOOKED_AT

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for news; False if there were none in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        is_new = self._changed.is_set()
        self._changed.clear()
        return is_new


class TaskPoller:
    """Looks at the tasks of all subscriptions. Must be used from one event loop.

    ``glance`` takes ids and gives what may change of each task that there is; ``revoked_of`` takes
    ids of API keys and gives those that were revoked. They run on a thread.
    """

    def __init__(
        self,
        glance: Callable[[Sequence[str]], Mapping[str, Glance]],
        *,
        revoked_of: Callable[[Set[str]], Set[str]] = lambda _: frozenset(),
        every_s: float = EVERY_S,
    ) -> None:
        self._glance = glance
        self._revoked_of = revoked_of
        self._keys_seen_at = -math.inf
        self.every_s = every_s
        self._followed: defaultdict[str, set[Subscription]] = defaultdict(set)  # by task id
        self._polling: asyncio.Task[None] | None = None
        self._is_away = False
        self.is_closed = False

    def add(self, subscription: Subscription) -> None:
        """Look at its task from now on."""
        self._followed[subscription.task_id].add(subscription)
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())

    def remove(self, subscription: Subscription) -> None:
        """Look at its task no more, unless another follows it."""
        others = self._followed[subscription.task_id]
        others.discard(subscription)
        if not others:
            del self._followed[subscription.task_id]

    def close(self) -> None:
        """Wake all and take no more: the server is stopping, and those who follow let go."""
        self.is_closed = True
        for subscriptions in self._followed.values():
            for subscription in subscriptions:
                subscription.wake()
        if self._polling is not None:
            self._polling.cancel()

    async def _poll(self) -> None:
        try:
            while self._followed:
                await self._look()
                await self._look_at_keys()
                await asyncio.sleep(self.every_s)
        finally:
            self._polling = None

    async def _look(self) -> None:
        for ids in _batches(sorted(self._followed)):
            try:
                found = await asyncio.to_thread(self._glance, ids)
            except Exception as error:  # the next look may succeed
                self._complain(error)
                return
            self._is_away = False
            for task_id in ids:
                state = found.get(task_id)
                for subscription in self._followed.get(task_id, ()):
                    if state != subscription.seen:
                        subscription.seen = state
                        subscription.wake()

    async def _look_at_keys(self) -> None:
        now = time.monotonic()
        if now - self._keys_seen_at < KEYS_EVERY_S:
            return
        self._keys_seen_at = now
        everyone = [each for followers in self._followed.values() for each in followers]
        try:
            revoked = await asyncio.to_thread(self._revoked_of, {each.key_id for each in everyone})
        except Exception as error:
            self._complain(error)
            return
        for subscription in everyone:
            if subscription.key_id in revoked:
                subscription.revoke()

    def _complain(self, error: Exception) -> None:
        if not isinstance(error, DATABASE_AWAY):
            _log.error("cannot look at the tasks that are followed", exc_info=error)
        elif not self._is_away:  # once, not at each look
            self._is_away = True
            _log.warning("cannot look at the tasks that are followed", reason=type(error).__name__)


class Subscriptions:
    """The subscriptions of one kind, bounded in all and by API key."""

    def __init__(self, poller: TaskPoller, *, most: int, most_of_a_key: int) -> None:
        self._poller = poller
        self._most = most
        self._most_of_a_key = most_of_a_key
        self._open: set[Subscription] = set()
        self._by_key: Counter[str] = Counter()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    @property
    def is_closed(self) -> bool:
        """Whether the server is stopping, and every subscription has to end."""
        return self._poller.is_closed

    def open(self, task_id: str, key_id: str) -> Subscription:
        """Follow a task, until ``release``.

        Raises:
            TooManySubscriptions: as many as may be are open, or the server is stopping.
        """
        if self.is_closed or len(self._open) >= self._most:
            raise TooManySubscriptions(is_of_key=False)
        if self._by_key[key_id] >= self._most_of_a_key:
            raise TooManySubscriptions(is_of_key=True)
        subscription = Subscription(task_id, key_id)
        self._open.add(subscription)
        self._by_key[key_id] += 1
        self._poller.add(subscription)
        return subscription

    def release(self, subscription: Subscription) -> None:
        """It has ended; may be called twice."""
        if subscription in self._open:
            self._open.remove(subscription)
            self._by_key -= Counter({subscription.key_id: 1})  # leaves no zeros
            self._poller.remove(subscription)


@dataclass(frozen=True, slots=True)
class HeldAnswer:
    """What a request was held for: its task as it is now, and why that is not its end yet.

    The task is None where it was deleted meanwhile, ``too_early`` empty where it has ended.
    """

    task: Task | None
    too_early: str = ""

    def explain(self, data: dict[str, Any]) -> dict[str, Any]:
        """The prediction object ``data`` as clients are told that they have to poll."""
        if not self.too_early:
            return data
        code, error = Code.SYNC_TIMED_OUT, _TOO_EARLY.format(reason=self.too_early)
        return data | {"status": "processing", "code": code, "error": error}


class SyncMode:
    """Holds requests until their task has ended, as the hosted service's sync mode does.

    A request that leaves, or is let go before the end, changes nothing about its task. ``find``
    gives a task by its id.
    """

    def __init__(
        self,
        subscriptions: Subscriptions,
        find: Callable[[str], Awaitable[Task | None]],
        *,
        limit_s: float,
    ) -> None:
        self._subscriptions = subscriptions
        self._find = find
        self._limit_s = limit_s

    async def hold(self, task: Task, leaves: Callable[[], Coroutine[Any, Any, None]]) -> HeldAnswer:
        """Wait for the end of ``task``, at most until the limit or until ``leaves`` returns.

        Raises:
            KeyRevoked: there is nothing to tell its user any more.
        """
        answer = await self._answer(task, leaves)
        metrics.SYNC_ANSWERS.labels("too_early" if answer.too_early else "ended").inc()
        return answer

    async def _answer(
        self, task: Task, leaves: Callable[[], Coroutine[Any, Any, None]]
    ) -> HeldAnswer:
        if task.status.is_terminal:
            return HeldAnswer(task)
        try:
            with self._following(task) as subscription:
                answer = await self._wait(subscription, leaves)
        except TooManySubscriptions:
            full = "the server holds as many requests as it may"
            return HeldAnswer(task, _STOPPING if self._subscriptions.is_closed else full)
        return answer or await self._last_look(task)

    @contextmanager
    def _following(self, task: Task) -> Iterator[Subscription]:
        subscription = self._subscriptions.open(task.id, task.key_id)
        try:
            yield subscription
        finally:
            self._subscriptions.release(subscription)

    async def _wait(
        self, subscription: Subscription, leaves: Callable[[], Coroutine[Any, Any, None]]
    ) -> HeldAnswer | None:
        """The answer at the end of the task; None if something else came before."""
        ending = asyncio.create_task(self._end_of(subscription))
        leaving = asyncio.create_task(leaves())
        try:
            both: set[asyncio.Task[Any]] = {ending, leaving}
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait(both, timeout=self._limit_s, return_when=first)
            return ending.result() if ending.done() else None
        finally:
            ending.cancel()
            leaving.cancel()

    async def _end_of(self, subscription: Subscription) -> HeldAnswer | None:
        """The task once it has ended or was deleted; None when the server stops."""
        while await subscription.wait() and not self._subscriptions.is_closed:
            if subscription.is_revoked:
                raise KeyRevoked
            glance = subscription.seen
            if isinstance(glance, Glance) and not glance.status.is_terminal:
                continue
            try:
                return HeldAnswer(await self._find(subscription.task_id))
            except Exception:  # the database is away again; logged by the look that meets it
                subscription.look_again()
        return None

    async def _last_look(self, task: Task) -> HeldAnswer:
        late = f"the task has not ended within {self._limit_s:g} s"
        reason = _STOPPING if self._subscriptions.is_closed else late
        try:
            now = await self._find(task.id)
        except Exception:  # the database is away: what was true before will do
            return HeldAnswer(task, reason)
        has_ended = now is None or now.status.is_terminal
        return HeldAnswer(now, "" if has_ended else reason)


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _BATCH):
        yield ids[start : start + _BATCH]
