"""One file while it arrives: in a nameless file on the disk, whatever its size and its pace.

A crash leaves nothing of it behind. Knows neither HTTP nor where the file goes when it is whole.
"""

import asyncio
import errno
import mmap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import IO

import structlog

from redux_server import metrics
from redux_server.errors import BadRequest, Unavailable
from redux_server.pictures.decode import accepted_formats, refusal_of, sniff
from redux_server.storage import temporary

_BUFFER_BYTES = 128 * 2**10
_SNIFFED_BYTES = 64
_log = structlog.get_logger("redux_server.pictures.incoming")


class Incoming:
    """A file that is arriving. ``excess`` is raised as soon as it has more than ``limit`` bytes.

    ``check_room`` is called before something is written, and may raise.
    """

    def __init__(
        self, file: IO[bytes], *, limit: int, excess: Exception, check_room: Callable[[], None]
    ) -> None:
        self._file = file
        self._limit = limit
        self._excess = excess
        self._check_room = check_room
        self._buffer = bytearray()
        self._is_sniffed = False
        self.size_bytes = 0

    async def write(self, data: bytes) -> None:
        """Add ``data``.

        Raises:
            ApiError: ``excess``; or a BadRequest, as this is the start of no picture; or an
                Unavailable, as the disk has no room for it.
        """
        self.size_bytes += len(data)
        if self.size_bytes > self._limit:
            raise self._excess
        self._buffer += data
        if not self._is_sniffed and len(self._buffer) >= _SNIFFED_BYTES:
            self._sniff()
        if len(self._buffer) >= _BUFFER_BYTES:
            await self._flush()

    @asynccontextmanager
    async def whole(self) -> AsyncIterator[memoryview]:
        """All that was written, within this context. Raises as ``write`` does."""
        if not self._is_sniffed:
            self._sniff()
        await self._flush()
        with mapped(self._file, self.size_bytes) as data:
            yield data

    def _sniff(self) -> None:
        self._is_sniffed = True
        start = bytes(self._buffer[:1024])
        if sniff(start) is None:
            seems = refusal_of(start) if start else "empty"
            accepted = ", ".join(accepted_formats())
            raise BadRequest(
                f"The file seems to be {seems}; accepted are {accepted}. Nothing was stored."
            )

    async def _flush(self) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        self._check_room()
        with refused_by_store():
            await asyncio.to_thread(append, self._file, data)


@contextmanager
def nameless_file(folder: Path) -> Iterator[IO[bytes]]:
    """A file in ``folder`` that is gone when it is closed, by whatever."""
    with refused_by_store():
        file = temporary.nameless_file(folder)
    with file:
        yield file


def append(file: IO[bytes], data: bytes) -> None:
    """Write all of ``data``: a file without a buffer may take a part."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def mapped(file: IO[bytes], size_bytes: int) -> Iterator[memoryview]:
    """The first ``size_bytes`` of ``file``.

    Mapped, not read: what the allocator was given for large files it would keep, for each thread
    that ever had one.
    """
    with refused_by_store():
        mapping = mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_READ)
    data = memoryview(mapping)
    try:
        yield data
    finally:
        with suppress(BufferError):  # a request that was given up may hold it a little longer
            data.release()
            mapping.close()


@contextmanager
def refused_by_store() -> Iterator[None]:
    """Tell a client of an ``OSError`` within that its file could not be stored."""
    try:
        yield
    except OSError as error:
        metrics.REJECTED.labels("blobs").inc()
        _log.warning("an upload could not be stored", reason=str(error))
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise Unavailable(
            f"The file could not be stored ({'no room is left' if full else 'store away'}); "
            "nothing was kept of it.",
            headers={"Retry-After": "30" if full else "5"},
        ) from None
