"""Whether the device still makes steps: a watch on it, kept by a thread that is not the device's.

A kernel that hangs keeps its thread in C for ever, and leases, which another thread renews, say
nothing of it. So a step may take so long as a multiple of the slowest of before, by the pixels
that it computes, and the first of a size longer: kernels are compiled then, graphs captured and
text encoders read. Knows no tasks and no pipeline.
"""

import faulthandler
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

FACTOR = 20
LEAST_S = 30.0
LEAST_NEW_S = 300.0  # of what is done for the first time
UNKNOWN_S = 1800.0  # before anything was learned: a large model's first step on a slow CPU
TICK_S = 0.5
_GIL_S = 15.0  # beyond the limit, for the watch itself to be heard
_LAST_RESORT_S = 60.0  # for the end of a process whose device hangs


class Watchdog:
    """Learns how long steps take, and says when one takes far too long.

    ``limit_s``, unless 0, is the limit of every step instead. Time counts only as far as ``tick``
    sees it pass: a process that was frozen, or a machine that slept, is not a device that hangs.
    """

    def __init__(
        self, *, limit_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._lock = threading.Lock()
        self._known: set[Hashable] = set()
        self._slowest = 0.0  # seconds for each pixel, of what was done before
        self._slowest_new = 0.0  # the same, of first times
        self._now: tuple[Hashable, int] | None = None
        self._step_began = 0.0
        self._ticked_at = clock()
        self._waited_s = 0.0

    def learn(self, pixels: int, seconds: float) -> None:
        """Note how long so many pixels took when they were made for the first time."""
        with self._lock:
            self._slowest_new = max(self._slowest_new, seconds / pixels)

    @contextmanager
    def watching(self, shape: Hashable, pixels: int) -> Iterator[None]:
        """Expect ``step`` to be called within the limit, again and again, until the end of this.

        What has the same ``shape`` needs nothing that the first one had not set up.
        """
        with self._lock:
            self._now = shape, pixels
            self._begin_step()
        try:
            yield
            with self._lock:
                self._note()
                self._known.add(shape)
        finally:
            with self._lock:
                self._now = None

    def step(self) -> None:
        """The device has done a step."""
        with self._lock:
            self._note()
            self._begin_step()

    @property
    def waited_s(self) -> float:
        """How long the device has been at its step; 0 while it has none."""
        with self._lock:
            return self._waited_s if self._now else 0.0

    @property
    def limit_s(self) -> float | None:
        """How long the step that is being made may take; None while there is none."""
        with self._lock:
            return self._limit() if self._now else None

    def tick(self) -> str | None:
        """Let time pass; why the device counts as hung, or None. To be called every ``TICK_S``."""
        with self._lock:
            now = self._clock()
            passed_s = min(now - self._ticked_at, 2 * TICK_S)
            self._ticked_at = now
            if self._now is None:
                return None
            self._waited_s += passed_s
            if self._waited_s <= self._limit():
                return None
            return (
                f"the device hangs: it made no step for {self._waited_s:.0f} s "
                "(--step-timeout-s sets how long one may take)"
            )

    def keep(
        self, has_ended: threading.Event, on_hang: Callable[[str], None], *, ends_process: bool
    ) -> None:
        """Tick until ``has_ended``, and call ``on_hang`` with the reason once the device hangs.

        What hangs and holds the interpreter's lock stops this thread, too. With ``ends_process``
        the interpreter's own watchdog, which needs no lock, then ends the process with code 1, as
        it does when the process is still there a minute after ``on_hang``.
        """
        while not has_ended.wait(TICK_S):
            reason = self.tick()
            if reason is not None:
                if ends_process:
                    faulthandler.dump_traceback_later(_LAST_RESORT_S, exit=True)
                on_hang(reason)
                return
            if ends_process:
                self._arm()
        if ends_process:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        limit_s = self.limit_s
        if limit_s is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(limit_s + _GIL_S, exit=True)

    def _begin_step(self) -> None:
        self._step_began = self._clock()
        self._waited_s = 0.0

    def _note(self) -> None:
        if self._now is None:
            return
        shape, pixels = self._now
        # What a frozen process missed is no time that the device took.
        took_s = min(self._clock() - self._step_began, self._waited_s + 2 * TICK_S)
        if shape in self._known:
            self._slowest = max(self._slowest, took_s / pixels)
        else:
            self._slowest_new = max(self._slowest_new, took_s / pixels)

    def _limit(self) -> float:
        assert self._now is not None
        if self._limit_s:
            return self._limit_s
        shape, pixels = self._now
        if shape in self._known:
            return max(LEAST_S, FACTOR * self._slowest * pixels)
        slowest = max(self._slowest, self._slowest_new)
        return max(LEAST_NEW_S, FACTOR * slowest * pixels) if slowest else UNKNOWN_S
