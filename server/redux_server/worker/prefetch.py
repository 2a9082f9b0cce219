"""Groups of tasks that a worker has claimed ahead: whose they are, and which is next on the device.

A group is fetched before it takes a place on the device. While it is, and while it waits for the
device, others of its API keys are not claimed; a key whose pictures come slowly holds a few places
of its own and nobody else's. Knows no store, no pictures and no device, only keys.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

AHEAD = 2
"""Groups that may wait for the device, each of other keys; more would keep them from others."""
SLOW, SLOW_OF_A_KEY = 16, 4
"""Groups that may be fetched while others are claimed."""
FETCHES, FETCHES_OF_A_KEY = 16, 6
"""Pictures that are fetched, or read and decoded, at a time."""
UNSTORED = 3
"""Groups on the device, or with images that are not stored yet."""


@dataclass(frozen=True, slots=True)
class Claimable:
    """What may be claimed now: no task of the API keys ``without``, none below ``priority``."""

    without: frozenset[str] = frozenset()
    priority: int | None = None


class Prefetch:
    """The places of a worker's groups. Every method may be called from any thread.

    ``has_changed`` is called when something else may be claimed than before.
    """

    def __init__(self, has_changed: Callable[[], None] = lambda: None) -> None:
        self._has_changed = has_changed
        self._change = threading.Condition()
        self._places: set[Place] = set()
        self._is_stopping = False

    def stop(self) -> None:
        """Let all go who wait for a place."""
        with self._change:
            self._is_stopping = True
            self._change.notify_all()

    def take(self) -> "Place":
        """A place ahead of the device, for a group that is still to be claimed; waits for one."""
        with self._change:
            self._change.wait_for(lambda: self._is_stopping or self._count("ahead") < AHEAD)
            place = Place(self)
            self._places.add(place)
            return place

    def claimable(self) -> Claimable:
        """What may be claimed for another place."""
        with self._change:
            ahead = [place for place in self._places if place.state == "ahead" and place.keys]
            slow = Counter(
                key for place in self._places if place.state == "slow" for key in place.keys
            )
            most = 1 if self._count("slow") >= SLOW else SLOW_OF_A_KEY
            excluded = {key for place in ahead for key in place.keys}
            excluded |= {key for key, count in slow.items() if count >= most}
            highest = max((place.priority for place in ahead), default=None)
        return Claimable(frozenset(excluded), highest)

    def _count(self, state: str) -> int:
        return sum(place.state == state for place in self._places)

    def _set(self, place: "Place", state: str) -> bool:
        with self._change:
            if state == "slow" and self._count("slow") >= SLOW:
                return False
            before, place.state = place.state, state
            if state == "left":
                self._places.discard(place)
            self._change.notify_all()
        if before in ("ahead", "slow") and state not in (before, "ahead"):
            self._has_changed()
        return True


class Place:
    """Where one group is: ahead of the device, slow to be fetched, on the device or beyond."""

    def __init__(self, prefetch: Prefetch) -> None:
        self._prefetch = prefetch
        self.state = "ahead"
        self.keys: frozenset[str] = frozenset()
        self.priority = 0

    def hold(self, keys: Iterable[str], priority: int) -> None:
        """The group is of these API keys."""
        self.keys, self.priority = frozenset(keys), priority

    def fetch_on(self, keys: Iterable[str]) -> bool:
        """Its pictures, of these keys, are slow: others may be claimed; False if too many are."""
        self.keys = frozenset(keys)
        return self._prefetch._set(self, "slow")

    def wait(self) -> None:
        """Its pictures are here, and it waits for the device."""
        self._prefetch._set(self, "ahead")

    def begin(self) -> None:
        """It is on the device."""
        self._prefetch._set(self, "begun")

    def leave(self) -> None:
        """It is no more; may be called again."""
        self._prefetch._set(self, "left")


class DeviceQueue:
    """Groups whose pictures are here, and which of them has the device next.

    That of the highest priority; then that whose keys had the device longest ago. So nobody waits
    for more than the group that is on it and one for each other key. ``clock`` gives seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._change = threading.Condition()
        self._waiting: list[tuple[int, frozenset[str]]] = []
        self._had_at: dict[str, float] = {}
        self._is_busy = False
        self._unstored = 0

    @contextmanager
    def unstored(self) -> Iterator[None]:
        """Around a turn, and around what has to be done with the images after it."""
        try:
            yield
        finally:
            with self._change:
                self._unstored -= 1
                self._change.notify_all()

    @contextmanager
    def turn(self, keys: frozenset[str], priority: int) -> Iterator[None]:
        """Wait for the device, and have it. Within ``unstored``."""
        me = (priority, keys)
        with self._change:
            self._waiting.append(me)
            self._change.wait_for(
                lambda: not self._is_busy and self._unstored < UNSTORED and self._first() is me
            )
            self._waiting = [each for each in self._waiting if each is not me]
            self._is_busy = True
            self._unstored += 1
        try:
            yield
        finally:
            with self._change:
                self._is_busy = False
                self._had_at.update(dict.fromkeys(keys, self._clock()))
                self._change.notify_all()

    def _first(self) -> tuple[int, frozenset[str]]:
        return min(
            self._waiting,
            key=lambda each: (-each[0], min(self._had_at.get(k, -math.inf) for k in each[1])),
        )


class FetchTurns:
    """Pictures that are fetched at a time: so many in all, and of one API key.

    So what lies in memory is bounded, and one key's slow hosts do not take all turns.
    """

    def __init__(self, *, in_all: int = FETCHES, of_a_key: int = FETCHES_OF_A_KEY) -> None:
        self._in_all = in_all
        self._of_a_key = of_a_key
        self._change = threading.Condition()
        self._running: Counter[str] = Counter()

    @contextmanager
    def turn(self, key_id: str) -> Iterator[None]:
        """Wait for a turn of the key, and have it."""
        with self._change:
            self._change.wait_for(
                lambda: (
                    self._running[key_id] < self._of_a_key and self._running.total() < self._in_all
                )
            )
            self._running[key_id] += 1
        try:
            yield
        finally:
            with self._change:
                self._running -= Counter({key_id: 1})  # leaves no zeros
                self._change.notify_all()
