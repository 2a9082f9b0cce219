"""Harm to what a server stands on, the same on one machine and in a cluster.

A decoding child, the folders of what is temporary, a file system, the device. Each function does it
and brings back what it took away; False where there was nothing to be hit.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from e2e.live import children

AWAY_S = 6.0
STEP_TIMEOUT_S = 6.0
"""``--step-timeout-s`` of the workers: a device that hangs is noticed after so many seconds."""
_DECODER = b"decode_child"


@contextmanager
def small_disk(place: Path, mib: int) -> Iterator[Path | None]:
    """A file system of its own at ``place``, if we may mount one."""
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(place)]
    made = subprocess.run(mount, capture_output=True, check=False)
    try:
        yield place if made.returncode == 0 else None
    finally:
        if place.is_mount():
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def kill_a_decoder(workers: Callable[[], Sequence[int]], *, within_s: float = 5.0) -> bool:
    """SIGKILL to the first process that is seen to decode a picture for one of ``workers``."""
    ends_at = time.monotonic() + within_s
    while time.monotonic() < ends_at:
        for pid in [child for worker in workers() for child in children(worker)]:
            with suppress(OSError):
                if _DECODER in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    return True
        time.sleep(0.005)
    return False


def fill(disk: Path, *, seconds: float = AWAY_S) -> bool:
    """Take every byte of a file system for a while, as another program's file would."""
    filler = disk / "other-peoples-file"
    try:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            for block in (b"x" * 2**20, b"x" * 2**12):
                with suppress(OSError):
                    while True:
                        file.write(block)
        is_full = shutil.disk_usage(disk).free < 2**12
        time.sleep(seconds)
    finally:
        filler.unlink(missing_ok=True)
    return is_full


def make_read_only(disk: Path, *, seconds: float = AWAY_S) -> bool:
    """Let nobody write to a file system for a while; False if something has it open to write."""
    if not _remount(disk, "ro"):
        return False
    try:
        time.sleep(seconds)
    finally:
        assert _remount(disk, "rw"), f"{disk} stays read-only"
    return True


def wipe(folder: Path) -> bool:
    """Delete all in a folder of what is temporary, as a cleaner of such folders does."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return bool(found)


def hang_the_device(flag: Path, *, within_s: float = 10.0) -> bool:
    """Have the next step of the fake model never end (see ``site``)."""
    flag.touch()
    ends_at = time.monotonic() + within_s
    while flag.exists() and time.monotonic() < ends_at:
        time.sleep(0.02)
    hangs = not flag.exists()
    flag.unlink(missing_ok=True)
    return hangs


def _remount(disk: Path, mode: str) -> bool:
    command = ["mount", "-o", f"remount,{mode}", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
