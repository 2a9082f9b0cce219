"""One worker per device: the lock it holds, and the name under which it leases tasks.

The lock is on a file, and the kernel gives it up when its process ends. Lock and name both belong
to a device and a data directory: whoever has the lock may take over what a predecessor of that name
left. Another machine, or another container on this one, has another data directory and so another
name, even if both have the same host name. Knows no worker and no device, only the files.
"""

import fcntl
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from redux_server.private_files import private_folder
from redux_server.settings import ServerSettings


def lock_path(settings: ServerSettings, device: str) -> Path:
    """The file whose lock the worker of ``device`` holds."""
    return settings.data_dir / f"worker-{device.replace(':', '-')}.lock"


@contextmanager
def device_lock(path: Path, *, before_waiting: Callable[[], None]) -> Iterator[None]:
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


def worker_id(data_dir: Path, device: str) -> str:
    """The name of the worker of ``device``: host, device and the data directory's own part."""
    return f"{socket.gethostname()}/{device}/{_own_part(data_dir / 'worker-id')}"


def _own_part(path: Path) -> str:
    """What is in the file, which is written once, with eight random digits, if it is not there."""
    if not path.exists():
        private_folder(path.parent)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".worker-id-") as file:
            file.write(secrets.token_hex(4))
            file.flush()
            with suppress(FileExistsError):  # another process was first
                os.link(file.name, path)
    return path.read_text().strip()
