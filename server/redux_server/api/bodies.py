"""Bodies of submits while they arrive: large ones lie on the disk, and count for their API key.

A submit may have 27 MiB and minutes to come, so many of them at a time must not be in memory. Knows
no parameters: what a body says is parsed here, and read elsewhere.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from fastapi import Request

from redux_server import metrics
from redux_server.errors import TooLarge, TooManyRequests, no_json
from redux_server.pictures.incoming import append, nameless_file, refused_by_store
from redux_server.pictures.long_texts import MAX_REST_BYTES, LongTexts, RestTooLarge, set_aside
from redux_server.storage.disk import DiskSpace, refuse_without_room

SMALL_BYTES = 256 * 2**10
"""Of a body that stays in memory."""
QUICK_BYTES = 64 * 2**10
"""What is parsed by the event loop itself."""
MAX_BYTES = 4 * 2**30
MAX_BYTES_OF_A_KEY = 2**30
_BUFFER_BYTES = 128 * 2**10
_SET_ASIDE_AT_ONCE = 2


class Body:
    """A body that has come: in memory, or in a nameless file in ``folder``, one of ``files``.

    ``check_room`` is called before something is written, and may raise.
    """

    def __init__(self, folder: Path, files: ExitStack, check_room: Callable[[], None]) -> None:
        self.size_bytes = 0
        self._folder = folder
        self._files = files
        self._check_room = check_room
        self._memory = bytearray()
        self._file: IO[bytes] | None = None

    async def add(self, data: bytes) -> None:
        """Take in what came."""
        self.size_bytes += len(data)
        self._memory += data
        if self._file is None and self.size_bytes > SMALL_BYTES:
            self._file = self._files.enter_context(nameless_file(self._folder))
        if self._file is not None and len(self._memory) >= _BUFFER_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Write what is not in the file yet."""
        if self._file is None or not self._memory:
            return
        data, self._memory = bytes(self._memory), bytearray()
        self._check_room()
        with refused_by_store():
            await asyncio.to_thread(append, self._file, data)

    def parse(self) -> tuple[Any, LongTexts]:
        """What it says, in Python's types, and the texts that were left on the disk.

        Raises:
            ValueError, RecursionError: it is no JSON.
            RestTooLarge: it is, perhaps, but most of it is no long text.
        """
        if self._file is None:
            return json.loads(self._memory), LongTexts()
        rest, texts = set_aside(self._file, self.size_bytes)
        return json.loads(rest), texts


class Bodies:
    """Takes bodies in; large ones grow in ``folder``. For use from one event loop."""

    def __init__(self, folder: Path, disk: DiskSpace) -> None:
        self.folder = folder
        self._disk = disk
        self._held: Counter[str] = Counter()
        self._work = asyncio.Semaphore(_SET_ASIDE_AT_ONCE)

    @property
    def held_bytes(self) -> int:
        """Of all bodies that are here, or on their way."""
        return self._held.total()

    def _check_room(self, key_id: str) -> None:
        refuse_without_room(
            self._disk,
            refused="No task is accepted now",
            therefore="nothing was started",
            held_bytes=self._held[key_id],
        )

    @asynccontextmanager
    async def receive(self, request: Request, key_id: str) -> AsyncIterator[Body]:
        """The whole body of ``request``, for as long as the context lasts.

        Raises:
            TooManyRequests: the key, or all, hold as much as they may, or the key more of the disk
                than is left of it.
            Unavailable: there is no room on the disk.
        """
        with ExitStack() as files, self._counted(key_id) as count:
            body = Body(self.folder, files, partial(self._check_room, key_id))
            async for data in request.stream():
                count(len(data))
                await body.add(data)
            await body.flush()
            yield body

    async def read(self, body: Body, example: str) -> tuple[Any, LongTexts]:
        """What ``body`` says, and its long texts; ``example`` is shown to whoever sends no JSON.

        Raises:
            BadRequest: it is not JSON.
            TooLarge: it is large for something else than its pictures.
        """
        try:
            if body.size_bytes <= QUICK_BYTES:
                return body.parse()
            async with self._work:
                return await asyncio.to_thread(body.parse)
        except RestTooLarge:
            raise TooLarge(
                f"The request has more than {MAX_REST_BYTES >> 10} KiB beside its pictures; leave "
                "out what is no parameter."
            ) from None
        except (ValueError, RecursionError):
            raise no_json(example) from None

    @asynccontextmanager
    async def turn_for(self, texts: LongTexts) -> AsyncIterator[None]:
        """The turn of a body with long texts, few of which are decoded at a time."""
        if not texts.spans:
            yield
            return
        async with self._work:
            yield

    @contextmanager
    def _counted(self, key_id: str) -> Iterator[Callable[[int], None]]:
        own = 0

        def count(size_bytes: int) -> None:
            nonlocal own
            if (
                self._held.total() + size_bytes > MAX_BYTES
                or self._held[key_id] + size_bytes > MAX_BYTES_OF_A_KEY
            ):
                metrics.REJECTED.labels("bodies").inc()
                raise TooManyRequests(
                    "Too many large requests are under way "
                    f"({MAX_BYTES_OF_A_KEY >> 20} MiB of one API key may be, {MAX_BYTES >> 20} MiB "
                    "of all); wait for one to be answered.",
                    headers={"Retry-After": "2"},
                )
            own += size_bytes
            self._held[key_id] += size_bytes

        try:
            yield count
        finally:
            self._held[key_id] -= own
            self._held += Counter()  # drops those that have none
