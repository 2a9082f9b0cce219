"""A real file system that is small enough to be filled."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 2**20


@contextmanager
def small_file_system(folder: Path) -> Iterator[Path]:
    """12 MiB, mounted in ``folder``; the test is skipped where that is not allowed."""
    place = folder / "small"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small file system here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(folder: Path, *, leave_bytes: int = 0) -> Path:
    """Use up the disk; returns the file that does."""
    path = folder / "other-peoples-file"
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                free = os.statvfs(folder)
                room = free.f_bavail * free.f_frsize - leave_bytes
                if room <= 0:
                    return path
                file.write(os.urandom(min(room, MIB)))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return path
