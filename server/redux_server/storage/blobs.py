"""Named byte strings: what a store of pictures does, and the one in a folder.

A key is ``{task}/{attempt}/{name}``: a worker that was given up for dead writes under its own
attempt and never over its successor's output. ``BucketBlobs`` in ``redux_server.storage.buckets``
does the same over an object store. Knows no URLs and no tasks.
"""

import errno
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore

from redux_server.private_files import private_folder

if TYPE_CHECKING:  # obstore has them in its stubs only
    from obstore import GetOptions, GetResult

MARKER = "flux-redux-store/database-id"
"""The key of a blob that says whose store it is, see ``redux_server.storage.owner``."""
_CHUNK_BYTES = 256 * 2**10
_LIST_CHUNK = 1000  # what one request to S3 can list, and delete


class StorageError(OSError):
    """The store of pictures does not take, give or delete right now; the text says why."""


@dataclass(frozen=True, slots=True)
class OpenBlob:
    """A blob, or a part of one, on its way: ``size_bytes`` is that of the whole.

    ``e_tag`` is quoted, as HTTP writes it, or empty.
    """

    size_bytes: int
    e_tag: str
    chunks: AsyncIterator[bytes]


class BlobStore(Protocol):
    """Named byte strings. Every method may be called from any thread.

    A reader sees all of a blob or none, and what was put is there after a power cut too. Where a
    method says nothing else it raises ``StorageError``, or another ``OSError``, for a store that
    does not do its work.
    """

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Store ``data`` under ``key``, replacing what was there."""
        ...

    def create(self, key: str, data: bytes | memoryview) -> None:
        """Store ``data`` under ``key``, once: of two at a time one gets through.

        Raises:
            FileExistsError: there is something, which stays as it is.
        """
        ...

    def get(self, key: str) -> bytes:
        """The bytes under ``key``.

        Raises:
            FileNotFoundError: there are none.
        """
        ...

    async def open(self, key: str, *, first: int = 0, end: int | None = None) -> OpenBlob:
        """The bytes under ``key`` from ``first`` to before ``end``, piece by piece.

        Raises:
            FileNotFoundError: there are none.
        """
        ...

    def delete_under(self, prefix: str) -> None:
        """Delete every blob whose key starts with the path ``prefix``."""
        ...

    def tasks_before(self, when: float) -> set[str]:
        """The tasks whose newest blob was written before ``when`` (Unix seconds)."""
        ...

    def check(self) -> None:
        """Find out whether the store can be used, in less than 5 s.

        Raises:
            StorageError: it cannot; the text says what to do.
        """
        ...


class ObjectBlobs(ABC):
    """What is the same over every store that obstore knows."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Store ``data`` in one write; an older blob is there until the new one is whole."""
        self._write(key, data, "overwrite")

    def create(self, key: str, data: bytes | memoryview) -> None:
        """Store ``data`` unless the key is taken, which the store itself decides."""
        self._write(key, data, "create")

    @abstractmethod
    def _write(
        self, key: str, data: bytes | memoryview, mode: Literal["create", "overwrite"]
    ) -> None:
        """Store ``data``; to ``create`` what is there already is a ``FileExistsError``."""

    def get(self, key: str) -> bytes:
        """Read all of a blob into memory."""
        with plain_errors():
            return bytes(obstore.get(self._store, key).bytes())

    async def open(self, key: str, *, first: int = 0, end: int | None = None) -> OpenBlob:
        """Ask for the blob or the part; its bytes are read while ``chunks`` is."""
        with plain_errors():
            options: GetOptions = {"range": {"offset": first} if end is None else (first, end)}
            is_whole = not first and end is None
            found = await obstore.get_async(self._store, key, options=None if is_whole else options)
        e_tag = (found.meta["e_tag"] or "").removeprefix("W/").strip('"')
        return OpenBlob(found.meta["size"], f'"{e_tag}"' if e_tag else "", _pieces(found))

    def delete_under(self, prefix: str) -> None:
        """List the blobs, and delete as many at a time as one request can."""
        with plain_errors():
            for chunk in obstore.list(self._store, prefix, chunk_size=_LIST_CHUNK):
                obstore.delete(self._store, [meta["path"] for meta in chunk])

    def tasks_before(self, when: float) -> set[str]:
        """List every blob there is; a task is the first part of its key."""
        newest: dict[str, float] = {}
        with plain_errors():
            for chunk in obstore.list(self._store, chunk_size=_LIST_CHUNK):
                for meta in chunk:
                    task = meta["path"].split("/", 1)[0]
                    written = meta["last_modified"].timestamp()
                    newest[task] = max(written, newest.get(task, 0.0))
        return {task for task, written in newest.items() if written < when}


class Blobs(ObjectBlobs):
    """Named byte strings in a folder: atomic writes, flushed before they count as done.

    With ``keep_free_bytes`` a picture that would leave less room than that on the disk is refused
    as by a full one: what is left is for the database.
    """

    def __init__(self, folder: Path, *, keep_free_bytes: int = 0) -> None:
        private_folder(folder)
        self._folder = folder
        self._keep_free_bytes = keep_free_bytes
        self._was_marked = False
        super().__init__(LocalStore(folder, automatic_cleanup=True))

    def _write(
        self, key: str, data: bytes | memoryview, mode: Literal["create", "overwrite"]
    ) -> None:
        self._check_there()
        if self._keep_free_bytes:
            free_bytes = shutil.disk_usage(self._folder).free
            if free_bytes - len(data) < self._keep_free_bytes:
                raise StorageError(errno.ENOSPC, "No space left for pictures", str(self._folder))
        with plain_errors():
            obstore.put(self._store, key, data, mode=mode)
        path = self._folder / key
        while path != self._folder.parent:
            _flush(path)
            path = path.parent

    def get(self, key: str) -> bytes:
        """Read all of a file into memory; a link out of the folder leads nowhere."""
        with self._told_from_away():
            self._check_inside(key)
            return super().get(key)

    async def open(self, key: str, *, first: int = 0, end: int | None = None) -> OpenBlob:
        """Read a file piece by piece; a link out of the folder leads nowhere."""
        with self._told_from_away():
            self._check_inside(key)
            return await super().open(key, first=first, end=end)

    def delete_under(self, prefix: str) -> None:
        """Delete a folder, with what a process that was killed has left in it.

        obstore writes ``name#1`` before it is renamed to ``name``, and neither lists nor deletes
        the former.
        """
        self._check_there()
        if not _is_inside(self._folder, prefix) or not prefix.strip("./"):
            return
        path = self._folder / prefix
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            for above in list(path.relative_to(self._folder).parents)[:-1]:
                (self._folder / above).rmdir()  # as long as nothing else is in there
        except FileNotFoundError:  # another process deletes it too
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                text = f"cannot delete {path}: {error.strerror}"
                raise StorageError(error.errno, text) from error

    def tasks_before(self, when: float) -> set[str]:
        """Look at every file there is, those of writes that were cut short too."""
        self._check_there()
        with os.scandir(self._folder) as entries:
            tasks = [each for each in entries if each.is_dir(follow_symlinks=False)]
        return {each.name for each in tasks if _newest(each.path) < when}

    @contextmanager
    def _told_from_away(self) -> Iterator[None]:
        """Say of a blob that is not there that all are away, if they are."""
        try:
            yield
        except FileNotFoundError:
            self._check_there()
            raise

    def _check_there(self) -> None:
        """Raise ``StorageError`` where the folder is gone, or an empty one stands in its place.

        That is so where a disk is not mounted: what is written there then would be lost later.
        """
        if not self._folder.is_dir():
            text = "The folder of pictures is away"
            raise StorageError(errno.ENOENT, text, str(self._folder))
        is_marked = (self._folder / MARKER).exists()
        if self._was_marked and not is_marked:
            text = f"The folder has lost {MARKER} (is its disk mounted?)"
            raise StorageError(errno.ENOENT, text, str(self._folder))
        self._was_marked = is_marked

    def _check_inside(self, key: str) -> None:
        if not _is_inside(self._folder, key):
            raise FileNotFoundError(key)

    def check(self) -> None:
        """Look whether this user may read and write the folder; writes nothing."""
        self._check_there()
        if not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
            raise StorageError(f"{self._folder} cannot be read and written by this user")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn obstore's errors into ``StorageError``, but for those of a blob that is (not) there."""
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StorageError("the bucket does not exist") from error
        raise
    except AlreadyExistsError as error:
        raise FileExistsError(summary(error)) from error
    except BaseError as error:
        text = summary(error)
        if "No space left" in text or "quota exceeded" in text:  # ENOSPC, EDQUOT
            raise StorageError(errno.ENOSPC, text) from error
        raise StorageError(text) from error


def summary(error: Exception) -> str:
    """What an obstore error says, on one line and without its debugging part."""
    text = str(error).partition("\n\nDebug source")[0]
    code = re.search(r"<Code>(.*?)</Code>", text)
    message = re.search(r"<Message>(.*?)</Message>", text)
    text = " ".join(re.sub(r"<[^>]*>.*", "", text, flags=re.DOTALL).split())
    told = ": ".join(found[1] for found in (code, message) if found)
    return f"{text} {told}".strip()[:500]


async def _pieces(found: "GetResult") -> AsyncIterator[bytes]:
    with plain_errors():
        async for piece in found.stream(min_chunk_size=_CHUNK_BYTES):
            yield bytes(piece)


def _is_inside(folder: Path, key: str) -> bool:
    """Whether ``key`` leads to a place below ``folder``, links followed."""
    try:
        return (folder / key).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, links in a circle
        return False


def _newest(folder: str) -> float:
    """When a file in ``folder`` was last written, at any depth; of an empty one, the folder."""
    times = [0.0]
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                times.append(os.lstat(f"{path}/{name}").st_mtime)
    if len(times) == 1:
        with suppress(FileNotFoundError):
            times.append(os.lstat(folder).st_mtime)
    return max(times)


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names are in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
