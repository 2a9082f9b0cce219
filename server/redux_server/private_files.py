"""Folders and files that their owner alone may read: they hold prompts, secrets and pictures.

Whoever made them, and with whatever mode. Knows not what is in them.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

_OTHERS = 0o077


def make_new_files_private() -> None:
    """From now on, this process and those that it starts make files that nobody else may read."""
    os.umask(_OTHERS)


def private_folder(folder: Path) -> None:
    """Make ``folder``, or take what others may do there if it is there already and ours.

    One that cannot be ours alone stays as it is: the home directory, ``/``, and folders with the
    sticky bit, such as ``/tmp``.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _belongs_to_all(folder):
        _close(folder)


def private_file(path: Path) -> None:
    """Make an empty file, or take what others may do with one that is there and ours."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    _close(path)


def is_open_to_others(path: Path) -> bool:
    """Whether the mode of ``path``, which is there, lets somebody else in."""
    return bool(path.stat().st_mode & _OTHERS)


def _belongs_to_all(folder: Path) -> bool:
    is_sticky = folder.stat().st_mode & stat.S_ISVTX
    home = None
    with suppress(RuntimeError):  # this user has none
        home = Path.home()
    return bool(is_sticky) or folder.resolve() in (home, Path("/"))


def _close(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _OTHERS:
        with suppress(PermissionError):  # somebody else's: what is in it is closed all the same
            path.chmod(mode & ~_OTHERS)
