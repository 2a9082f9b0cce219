"""One worker per device: a lock on a file, which the kernel gives up when its process ends.

Knows no worker and no device, only the file.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from redux_server.settings import ServerSettings


def lock_path(settings: ServerSettings, device: str) -> Path:
    """The file whose lock the worker of ``device`` holds."""
    return settings.data_dir / f"worker-{device.replace(':', '-')}.lock"


@contextmanager
def holding(path: Path, *, before_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock; where another process has it, call ``before_waiting`` and wait."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            before_waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_free(path: Path) -> bool:
    """Whether no process holds the lock, as far as anyone can say without taking it."""
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
