"""Which workers may take which tasks: those that run what the task was accepted for.

A fingerprint names the weights and the version of this program, as ``3f9a2c7d1e0b/0.1.0``. A task
gets that of the workers that are ready when it is accepted; an empty one fits every worker. Other
weights never take it. Another version with the same weights does once no worker of its own version
is left, so that an upgrade strands nothing.
"""

import time
from collections.abc import Callable, Collection

import structlog

from redux_server import __version__
from redux_server.dispatch.presence import Presence
from redux_server.tasks.store import TaskStore

ANY = ""
EVERY_S = 5.0
_log = structlog.get_logger("redux_server.dispatch.fingerprint")


def fingerprint_of(weights: str, version: str = __version__) -> str:
    """The fingerprint of ``weights`` (``ModelInfo.weights``) run by ``version``."""
    return f"{weights}/{version}"


def described(fingerprint: str) -> str:
    """A fingerprint in words."""
    weights, _, version = fingerprint.rpartition("/")
    return f"the weights {weights} and version {version}"


def served(own: Collection[str], alive: Collection[str], bound: Collection[str]) -> frozenset[str]:
    """What workers of the fingerprints ``own`` may take.

    ``alive`` are the fingerprints of all workers, ``bound`` those of the tasks that wait.
    """
    weights = {_weights(each) for each in own if each}
    left = {each for each in bound if _weights(each) in weights and each not in alive}
    return frozenset({ANY, *own, *left})


def _weights(fingerprint: str) -> str:
    return fingerprint.rpartition("/")[0]


class Served:
    """What one worker may take; asks the database now and then. For any thread."""

    def __init__(
        self,
        fingerprint: str,
        store: TaskStore,
        presence: Presence,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own = fingerprint
        self._store = store
        self._presence = presence
        self._clock = clock
        self._found = frozenset({ANY, fingerprint})
        self._look_at = 0.0

    def __call__(self) -> frozenset[str]:
        """The fingerprints of tasks that may be claimed now."""
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + EVERY_S
            alive = {*self._presence.fingerprints(), self._own}
            found = served([self._own], alive, self._store.bound())
            for each in sorted(found - self._found):
                text = "tasks of a version that no worker is left of are worked on by this one"
                _log.warning(text, accepted_for=each, worked_on_by=self._own)
            self._found = found
        return self._found
