"""Room on the disk: a floor below which no task is accepted, and a ballast to throw off.

A full disk stops the database too, and then a finished task could not be recorded. So tasks are
refused while some room is left, and a file of a fixed size is kept only to be deleted when even
that was used up, by whomever. Knows no tasks, and no HTTP beyond the error that it raises.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from redux_server import metrics
from redux_server.errors import TooManyRequests, Unavailable

BALLAST_BYTES = 16 * 2**20
_log = structlog.get_logger("redux_server.storage.disk")
T = TypeVar("T")


class DiskSpace:
    """The room where tasks and pictures are kept, and whether it is enough for new ones.

    ``folders`` may be on one disk or on several; ``free`` gives the free bytes of one.
    """

    def __init__(
        self,
        folders: Iterable[Path],
        *,
        floor_bytes: int,
        free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._folders = tuple(folders)
        self._floor_bytes = floor_bytes
        self._free = free

    def free_bytes(self) -> int:
        """Free bytes on the fullest disk; 0 where one is away."""
        try:
            return min(self._free(folder) for folder in self._folders)
        except OSError:
            return 0

    @property
    def is_bounded(self) -> bool:
        """Whether there is a floor."""
        return self._floor_bytes > 0

    def room_bytes(self) -> int:
        """Free bytes above the floor, on the fullest disk."""
        return max(0, self.free_bytes() - self._floor_bytes)

    def left_of_share(self, share: int, stored_bytes: int) -> int:
        """How many bytes more one may store who has so many, with a ``share`` in percent.

        What is stored may be ``share / (100 - share)`` times what stays free above the floor.
        """
        return (share * self.room_bytes() - (100 - share) * stored_bytes) // 100

    def complaint(self) -> str | None:
        """Why no task can be accepted now; None when there is room."""
        try:
            free_bytes = min(self._free(folder) for folder in self._folders)
        except OSError as error:
            return f"a folder of the server cannot be used ({error.strerror})"
        if free_bytes >= self._floor_bytes:
            return None
        return (
            f"the server's disk is nearly full ({free_bytes >> 20} MiB free, "
            f"--min-free-disk is {self._floor_bytes >> 20} MiB)"
        )


class Ballast:
    """A file that holds ``size_bytes`` of the disk until they are needed; 0 is none at all.

    Any process may make and release it; its name says whether it is there.
    """

    def __init__(self, path: Path, size_bytes: int = BALLAST_BYTES) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def hold(self) -> bool:
        """Make the file, if it is not there and as much again would stay free; True if made."""
        if not self._size_bytes or self._path.exists():
            return False
        if shutil.disk_usage(self._path.parent).free < 2 * self._size_bytes:
            return False
        # One name for all who try: what one left behind that was killed is the next one's.
        growing = self._path.with_name(f"{self._path.name}.growing")
        try:
            with open(growing, "wb") as file:
                # Not truncate(): that makes a sparse file, which holds nothing.
                os.posix_fallocate(file.fileno(), 0, self._size_bytes)
            growing.replace(self._path)
        except OSError as error:
            growing.unlink(missing_ok=True)
            _log.warning("no ballast could be made", reason=str(error))
            return False
        return True

    def release(self) -> bool:
        """Delete the file; True if it was there."""
        try:
            self._path.unlink()
        except OSError:
            return False
        _log.warning("disk full: released the ballast", freed_bytes=self._size_bytes)
        return True

    def make_room_for(self, change: Callable[[], T]) -> T:
        """Do ``change`` to the database; if the disk is too full, without the ballast, again."""
        try:
            return change()
        except SQLAlchemyError as error:
            if not (is_full(error) and self.release()):
                raise
            return change()


def is_full(error: BaseException) -> bool:
    """Whether a disk without room (or a quota) is behind an error of the database or a file."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # SQLite has a code of its own for a full disk, but not where it maps or extends its index of
    # the write-ahead log.
    return "disk is full" in str(error) or "disk I/O error" in str(error)


def refuse_without_room(
    disk: DiskSpace, *, refused: str, therefore: str, held_bytes: int = 0
) -> None:
    """Let nothing new in when the disk is nearly full, nor from a key that holds half of the room.

    ``held_bytes`` are those of the key that are on the disk while they arrive.

    Raises:
        Unavailable: the disk is nearly full; the text begins with ``refused`` ("No task is accepted
            now") and ends in ``therefore``.
        TooManyRequests: the key holds more than is left for others.
    """
    reason = disk.complaint()
    if reason is not None:
        metrics.REJECTED.labels("disk_full").inc()
        raise Unavailable(f"{refused}: {reason}; {therefore}.", headers={"Retry-After": "30"})
    if held_bytes and disk.is_bounded and held_bytes > disk.room_bytes():
        metrics.REJECTED.labels("disk_share").inc()
        raise TooManyRequests(
            f"{refused}: what this API key is sending takes {held_bytes:,} bytes of the server's "
            f"disk, more than is left on it for others; {therefore}. Send less at a time.",
            headers={"Retry-After": "5"},
        )
