"""Under which name a worker holds tasks.

The name belongs to a device and a data directory, as the device's lock does: who holds the lock may
take over what a predecessor of that name left. Another machine, or another container on this one,
has another data directory and so another name, even if both have the same host name.
"""

import os
import secrets
import socket
import tempfile
from contextlib import suppress
from pathlib import Path


def worker_id(data_dir: Path, device: str) -> str:
    """The name of the worker of ``device``: host, device and the data directory's own part."""
    return f"{socket.gethostname()}/{device}/{_own_part(data_dir / 'worker-id')}"


def _own_part(path: Path) -> str:
    """What is in the file, which is written once, with eight random digits, if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".worker-id-") as file:
            file.write(secrets.token_hex(4))
            file.flush()
            with suppress(FileExistsError):  # another process was first
                os.link(file.name, path)
    return path.read_text().strip()
