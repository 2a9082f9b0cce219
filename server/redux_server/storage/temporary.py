"""What is temporary lies in the data directory, whose room is watched: never in the system's /tmp.

That one may be full, read-only, or swept while we run. Our own files there have no name, so that a
crash leaves none; libraries and child processes get a folder, one for each process. The next start
deletes those of processes that have ended. Loads little: it is used before anything else.
"""

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_LOCK = ".lock"  # of `tmp` while folders are made or swept; of a process's folder while it lives


def nameless_file(folder: Path) -> IO[bytes]:
    """A file without a buffer in ``folder``, gone when it is closed, by whatever.

    A ``folder`` that was lost is made again, and the one above it; not the data directory.

    Raises:
        OSError: it cannot be made.
    """
    try:
        return tempfile.TemporaryFile(dir=folder, buffering=0)
    except FileNotFoundError:
        _make(folder.parent)
        _make(folder)
        return tempfile.TemporaryFile(dir=folder, buffering=0)


def check_room(folder: Path, size_bytes: int) -> None:
    """Find out whether a file of ``size_bytes`` can be had in ``folder``.

    Raises:
        OSError: it cannot.
    """
    with nameless_file(folder) as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)


def use_temporary_folder(folder: Path) -> None:
    """From now on, have this process and its children keep in ``folder`` what is temporary.

    For a process that is about to serve: once, and before other threads or libraries are there.

    Raises:
        OSError: it cannot be made, or written to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _make(folder)
    with _locked(folder / _LOCK):
        _sweep(folder)
        own = folder / secrets.token_hex(4)
        _make_own(own)
    os.environ["TMPDIR"] = tempfile.tempdir = str(own)


def remake_temporary_folder() -> None:
    """Make the folder of ``use_temporary_folder`` again, if it was lost."""
    own = os.environ.get("TMPDIR", "")
    if own and own == tempfile.tempdir and not os.path.exists(f"{own}/{_LOCK}"):
        _make(Path(own).parent)
        with _locked(Path(own).parent / _LOCK):
            _make_own(Path(own))


def _make_own(folder: Path) -> None:
    """Make the folder of this process, and say that we live.

    No child inherits the descriptor of the lock, and the kernel closes it, whatever ends us.
    """
    _make(folder)
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)


def _sweep(folder: Path) -> None:
    """Delete what processes that have ended left behind."""
    for entry in os.scandir(folder):
        if entry.name == _LOCK:
            continue
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
        elif not _is_held(Path(entry.path, _LOCK)):
            shutil.rmtree(entry.path, ignore_errors=True)


def _is_held(path: Path) -> bool:
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab", opener=_for_its_owner) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path) -> None:
    folder.mkdir(exist_ok=True, mode=0o700)
