"""Pictures that clients upload before they ask for a task: taken in, kept for a time, swept.

``UploadTickets`` are the right to store one file, in the path of the URL that it is sent to;
``Uploads`` takes files in, by a ticket or a form. Any file that is no picture of a kind we take is
refused while it arrives, so that we never serve pages or programs of strangers. Knows no HTTP
beyond the errors that it raises.
"""

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from redux_server import metrics
from redux_server.errors import BadRequest, Conflict, Gone, NotFound, TooLarge, TooManyRequests
from redux_server.pictures.decode import sniff
from redux_server.pictures.incoming import Incoming, nameless_file, refused_by_store
from redux_server.pictures.upload_records import UploadRecord, UploadRecords
from redux_server.settings import ServerSettings
from redux_server.storage.blobs import BlobStore
from redux_server.storage.disk import DiskSpace, refuse_without_room
from redux_server.storage.opening import local_folder
from redux_server.storage.signing import Signer
from redux_server.storage.threads import StorageThreads
from redux_server.tasks.stored import FILE_BYTES

PREFIX = "upload-"
TICKET_S = 3600.0
EXTENSIONS = {
    "png": "png", "jpg": "jpg", "jpeg": "jpg", "jfif": "jpg", "webp": "webp", "gif": "gif",
    "bmp": "bmp", "avif": "avif", "heic": "heic", "heif": "heic", "tif": "tif", "tiff": "tif",
}  # fmt: skip
_PURPOSE = "upload"
_TICKET = re.compile(
    r"(?P<seal>[0-9a-f]{32})\.(?P<text>(?P<expires_at>[0-9]{1,12})\.(?P<size>[0-9]{1,10})\."
    r"(?P<owner>[0-9a-f]{8})\.(?P<id>[0-9a-f]{32})\.(?P<extension>[a-z]{3,4}))"
)
MAX_NAME = 1024
MAX_OPEN = 64
MAX_OPEN_PER_OWNER = 32
GRACE_S = 3600.0  # a task that came with a URL in its last minute may have to wait
_STORED_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class UploadTicket:
    """The right to store one file of exactly ``size_bytes`` under ``key``, once."""

    key: str
    size_bytes: int
    owner: str
    expires_at: float
    text: str

    def check_length(self, given: str | None) -> None:
        """Refuse a body that says of itself that it has another length.

        Raises:
            BadRequest: it does.
        """
        if given is not None and given.isdecimal() and int(given) != self.size_bytes:
            raise self.wrong_size(f"{int(given):,}")

    def wrong_size(self, given: str) -> BadRequest:
        """What to raise for a body of another length."""
        return BadRequest(
            f"The body has {given} bytes, but the upload was announced with {self.size_bytes:,}; "
            "send the file as it is, or ask for another upload URL."
        )


class UploadTickets:
    """Writes and reads tickets, and keeps none. ``clock`` gives Unix seconds.

    What a ticket allows stands in it, under a seal that only we can make; nothing of a client's
    file name is in it, nor in the key of what it stores.
    """

    def __init__(self, signer: Signer, *, clock: Callable[[], float] = time.time) -> None:
        self._signer = signer
        self._clock = clock

    def issue(self, key_id: str, name: str, content_type: str, size_bytes: int) -> UploadTicket:
        """A ticket for a file of that name, type and size."""
        extension = _extension(name, content_type)
        expires_at = int(self._clock() + TICKET_S)
        text = f"{expires_at}.{size_bytes}.{owner_of(key_id)}.{secrets.token_hex(16)}.{extension}"
        return self.read(f"{self._signer.seal(_PURPOSE, text)}.{text}")

    def read(self, text: str) -> UploadTicket:
        """The ticket that ``issue`` wrote as ``text``.

        Raises:
            NotFound: we did not.
            Gone: its time is over.
        """
        match = _TICKET.fullmatch(text)
        seal = self._signer.seal(_PURPOSE, match["text"]) if match else ""
        if match is None or not secrets.compare_digest(seal, match["seal"]):
            raise NotFound("No such upload; POST /api/v3/media/uploads gives a URL to send it to.")
        if int(match["expires_at"]) < self._clock():
            raise Gone("The time to send this file is over; ask for another upload URL.")
        return UploadTicket(
            key=key_of(match["id"], match["extension"]),
            size_bytes=int(match["size"]),
            owner=match["owner"],
            expires_at=float(match["expires_at"]),
            text=text,
        )


def key_of(id_: str, extension: str) -> str:
    """Where the upload ``id_`` is kept."""
    return f"{PREFIX}{id_}/picture.{extension}"


def _id_of(key: str) -> str:
    return key.removeprefix(PREFIX).partition("/")[0]


def owner_of(key_id: str) -> str:
    """Whom to count an upload for, in a form that may stand in a URL."""
    return hashlib.sha256(key_id.encode()).hexdigest()[:8]


def _extension(name: str, content_type: str) -> str:
    """What the URL of a picture ends in, as far as it can be told before it has come."""
    suffix = name.rpartition(".")[2].lower()
    subtype = content_type.partition(";")[0].rpartition("/")[2].strip().lower()
    return EXTENSIONS.get(suffix) or EXTENSIONS.get(subtype) or "png"


class Uploads:
    """Takes files in. They grow in ``folder``; ``clock`` gives Unix seconds.

    For use from one event loop. What is refused for its number, size or kind is refused before it
    has all come.
    """

    def __init__(
        self,
        settings: ServerSettings,
        *,
        blobs: BlobStore,
        threads: StorageThreads,
        signer: Signer,
        disk: DiskSpace,
        folder: Path,
        records: UploadRecords,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.records = records
        self.max_stored_bytes = settings.max_stored_uploads * 2**20
        # A bucket has no end; of a disk, a key may have as much as it leaves.
        self._is_on_disk = local_folder(settings.blob_url, settings.blobs_dir) is not None
        self.max_bytes = settings.max_upload * 2**20
        self.tickets = UploadTickets(signer, clock=clock)
        self._kept_s = settings.upload_retention_hours * 3600
        self._blobs = blobs
        self._in_thread = threads
        self._signer = signer
        self._disk = disk
        self._folder = folder
        self._clock = clock
        self._open: dict[str, list[Incoming]] = {}  # by owner
        self._storing = asyncio.Semaphore(_STORED_AT_ONCE)

    async def issue(
        self, key_id: str, name: str, content_type: str, size_bytes: int
    ) -> UploadTicket:
        """A ticket for a file of that name, type and size, for which room is kept.

        Raises:
            TooLarge: no file may have that size, or the key stores too much.
            Unavailable: there is no room on the disk.
        """
        if size_bytes > self.max_bytes:
            raise self._too_large(f"The file has {size_bytes:,} bytes")
        self._check_room()
        ticket = self.tickets.issue(key_id, name, content_type, size_bytes)
        await self._note(key_id, ticket.key, name, size_bytes, expires_at=ticket.expires_at)
        return ticket

    async def check_stored(self, key_id: str) -> None:
        """Refuse a file of a key that has no room for any.

        Raises:
            TooLarge: it has none.
            Unavailable: there is no room on the disk.
        """
        self._check_room()
        stored = await asyncio.to_thread(self.records.stored, key_id)
        if self._left(stored.size_bytes) <= FILE_BYTES:
            raise self._share_is_full(0)

    @contextmanager
    def receive(self, key_id: str) -> Iterator[Incoming]:
        """Take in one file of the owner of the API key ``key_id``.

        Raises:
            TooManyRequests: as many are arriving as may at a time.
            Unavailable: there is no room on the disk.
        """
        excess = self._too_large("The file is larger")
        with self._take_in(owner_of(key_id), self.max_bytes, excess) as incoming:
            yield incoming

    @contextmanager
    def receive_for(self, ticket: UploadTicket) -> Iterator[Incoming]:
        """Take in the file of ``ticket``. Raises as ``receive`` does."""
        excess = ticket.wrong_size("more")
        with self._take_in(ticket.owner, ticket.size_bytes, excess) as incoming:
            yield incoming

    async def keep(self, key_id: str, name: str, incoming: Incoming) -> str:
        """Store a whole file of the API key ``key_id`` under a key of its own; returns the key.

        Raises:
            BadRequest: it is no picture of a kind that we take.
            TooLarge: the API key stores too much.
            Unavailable: the store does not take it.
        """
        async with self._storing, incoming.whole() as data:
            extension = EXTENSIONS[(sniff(bytes(data[:64])) or "").lower()]
            key = key_of(secrets.token_hex(16), extension)
            expires_at = self._clock() + self._kept_s
            await self._note(key_id, key, name, len(data), expires_at=expires_at)
            try:
                with refused_by_store():
                    await self._in_thread(self._blobs.put, key, data)
            except BaseException:
                await asyncio.to_thread(self.records.forget, [_id_of(key)])
                raise
            await asyncio.to_thread(self.records.has_come, _id_of(key), expires_at=expires_at)
        return key

    async def redeem(self, ticket: UploadTicket, incoming: Incoming) -> None:
        """Store a whole file where ``ticket`` says. The same file once more changes nothing.

        Raises:
            BadRequest: not of the size that was told, or no picture of a kind that we take.
            Conflict: another file is there, which a task may be using.
            Gone: it was deleted, or is older than this server remembers.
            Unavailable: the store does not take it.
        """
        id_ = _id_of(ticket.key)
        async with self._storing, incoming.whole() as data:
            if len(data) != ticket.size_bytes:
                raise ticket.wrong_size(f"{len(data):,}")
            if await asyncio.to_thread(self.records.owner, id_) is None:
                raise Gone("This upload was deleted; ask for another upload URL.")
            with refused_by_store():
                is_there = await self._in_thread(self._create, ticket.key, data)
            if is_there:
                expires_at = self._clock() + self._kept_s
                has_come = partial(self.records.has_come, id_, expires_at=expires_at)
                if not await asyncio.to_thread(has_come):
                    await self._in_thread(self._blobs.delete_under, PREFIX + id_)
                    raise Gone("This upload was deleted; ask for another upload URL.")
        if not is_there:
            raise Conflict(
                "Another file was stored with this upload URL, and stays; ask for another URL."
            )

    def download_path(self, key: str, until: float | None = None) -> str:
        """The path at which anyone may fetch ``key``: ``until`` then, or as long as it is kept."""
        return self._signer.path(key, self._clock() + self._kept_s if until is None else until)

    def delete(self, key_id: str, ids: Collection[str]) -> int:
        """Delete those of ``ids`` that are of the API key, files first; returns how many.

        Raises:
            OSError: the store does not delete; what it did not delete is still listed.
        """
        deleted = 0
        for record in self.records.find(key_id, ids):
            self._blobs.delete_under(PREFIX + record.id)
            deleted += self.records.forget([record.id])
        return deleted

    def sweep(self, now: float) -> int:
        """Delete what was stored longer ago than it is kept, and some grace; returns how many."""
        old = self._blobs.tasks_before(now - self._kept_s - GRACE_S)
        folders = sorted(name for name in old if name.startswith(PREFIX))
        for folder in folders:
            self._blobs.delete_under(folder)
        self.records.forget_expired(announced=now - GRACE_S, stored=now - GRACE_S)
        return len(folders)

    @contextmanager
    def _take_in(self, owner: str, limit: int, excess: Exception) -> Iterator[Incoming]:
        mine = self._open.get(owner, [])
        if sum(map(len, self._open.values())) >= MAX_OPEN or len(mine) >= MAX_OPEN_PER_OWNER:
            metrics.REJECTED.labels("uploads_open").inc()
            raise TooManyRequests(
                f"Too many uploads are under way ({MAX_OPEN} may be, {MAX_OPEN_PER_OWNER} of one "
                "API key); wait for one to end.",
                headers={"Retry-After": "5"},
            )
        self._check_room()

        def check_room() -> None:
            self._check_room(held_bytes=sum(each.size_bytes for each in mine))

        with nameless_file(self._folder) as file:
            incoming = Incoming(file, limit=limit, excess=excess, check_room=check_room)
            self._open[owner] = mine
            mine.append(incoming)
            try:
                yield incoming
            finally:
                mine.remove(incoming)
                if not mine:
                    self._open.pop(owner, None)

    async def _note(
        self, key_id: str, key: str, name: str, size_bytes: int, *, expires_at: float
    ) -> None:
        """Note the file ``key`` before it is stored, if there is room for it."""
        record = UploadRecord(
            _id_of(key), key, name[:MAX_NAME], size_bytes, self._clock(), expires_at, None
        )
        room = await asyncio.to_thread(self.records.add, key_id, record, left=self._left)
        if room is not None:
            raise self._share_is_full(room)

    def _left(self, stored_bytes: int) -> int:
        """How many bytes a key may still store that stores so many."""
        left = self.max_stored_bytes - stored_bytes
        if self._is_on_disk:  # what it stores then is at most what is left for others
            left = min(left, self._disk.left_of_share(50, stored_bytes))
        return left

    def _share_is_full(self, room: int) -> TooLarge:
        metrics.REJECTED.labels("uploads_stored").inc()
        return TooLarge(
            f"This API key has room for {room:,} bytes more of uploads ({self.max_stored_bytes:,} "
            "may be stored, and no more than is left on the disk for others). Delete uploads that "
            "are not needed: GET /api/v3/media/uploads lists them, POST /api/v3/media/uploads/"
            "delete deletes them."
        )

    def _create(self, key: str, data: memoryview) -> bool:
        """Whether ``data`` is what is under ``key`` now."""
        try:
            self._blobs.create(key, data)
        except FileExistsError:
            return self._blobs.get(key) == data
        return True

    def _check_room(self, held_bytes: int = 0) -> None:
        refuse_without_room(
            self._disk,
            refused="No upload is taken now",
            therefore="nothing was kept of it",
            held_bytes=held_bytes,
        )

    def _too_large(self, given: str) -> TooLarge:
        return TooLarge(
            f"{given}; allowed are at most {self.max_bytes:,} bytes ({self.max_bytes >> 20} MiB). "
            "Send a smaller picture, or a task with its URL."
        )
