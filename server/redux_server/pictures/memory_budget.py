"""Memory that several threads may use together: whoever needs some waits in line for it.

Knows not what for.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class NoMemoryInTime(Exception):
    """Others had the memory for longer than one would wait."""


class MemoryBudget:
    """``total_bytes``, of which no more than all are reserved at any time.

    First come, first served: a large reservation is not passed by small ones for ever.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._free_bytes = total_bytes
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @property
    def free_bytes(self) -> int:
        """What nobody has reserved."""
        return self._free_bytes

    @contextmanager
    def reserve(self, size_bytes: int, *, wait_s: float) -> Iterator[None]:
        """Have ``size_bytes`` within this context; more than there are count as all.

        Raises:
            NoMemoryInTime: after ``wait_s`` it was not our turn.
        """
        wanted = min(size_bytes, self.total_bytes)
        self._take(wanted, wait_s)
        try:
            yield
        finally:
            with self._changed:
                self._free_bytes += wanted
                self._changed.notify_all()

    def _take(self, wanted: int, wait_s: float) -> None:
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                if not self._changed.wait_for(
                    lambda: self._waiting[0] is turn and self._free_bytes >= wanted, wait_s
                ):
                    raise NoMemoryInTime
                self._free_bytes -= wanted
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()  # the next may have room, too


def return_freed() -> None:
    """Let the system have what was freed, of every thread.

    glibc keeps freed blocks of up to 32 MiB, in an arena for each thread, and only gives back the
    end of one: after large pictures in six threads it held 0.8 GiB. See malloc_trim(3) and
    ``M_MMAP_THRESHOLD`` in mallopt(3). Of another C library nothing is known, and nothing is done.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
