"""What is uploaded, by whom: one row for each file that is announced or kept.

The rows say how much an API key stores, and are what its owner lists and deletes. Knows no files:
``redux_server.pictures.uploads`` stores and deletes them.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, Select, delete, func, insert, or_, select, update

from redux_server.database.connection import reader, take_turns
from redux_server.database.tables import uploads
from redux_server.tasks.stored import FILE_BYTES


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """One file. Times are Unix seconds; ``stored_at`` is None while it has not come yet."""

    id: str
    blob: str
    filename: str
    size_bytes: int
    created_at: float
    expires_at: float
    stored_at: float | None


@dataclass(frozen=True, slots=True)
class Stored:
    """How many files a key has, and what they count; those that are announced too."""

    files: int
    size_bytes: int


_COLUMNS = tuple(uploads.c[name] for name in UploadRecord.__slots__)


class UploadRecords:
    """The rows. Every method is one transaction, and may be called from any thread."""

    def __init__(self, database: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._reader = reader(database)
        self._clock = clock

    def add(self, key_id: str, record: UploadRecord, *, left: Callable[[int], int]) -> int | None:
        """Note a file of the key if there is room for it; None, or how many bytes there is room.

        ``left`` says for what the key's files count now how many bytes more may be stored.
        """
        with self._database.begin() as db:
            take_turns(db, "uploads")
            room = left(db.execute(_stored(key_id)).one().size_bytes) - FILE_BYTES
            if record.size_bytes > room:
                return max(0, room)
            values = {name: getattr(record, name) for name in UploadRecord.__slots__}
            db.execute(insert(uploads), {**values, "key_id": key_id})
        return None

    def has_come(self, id_: str, *, expires_at: float) -> bool:
        """Note that the file is stored, until ``expires_at``; False if its row was deleted."""
        with self._database.begin() as db:
            stored_at = func.coalesce(uploads.c.stored_at, self._clock())
            values = {"stored_at": stored_at, "expires_at": expires_at}
            done = db.execute(update(uploads).where(uploads.c.id == id_).values(values))
        return bool(done.rowcount)

    def owner(self, id_: str) -> str | None:
        """The API key that announced the file; None if there is no such row."""
        with self._reader.connect() as db:
            return db.scalar(select(uploads.c.key_id).where(uploads.c.id == id_))

    def stored(self, key_id: str) -> Stored:
        """What the key has."""
        with self._reader.connect() as db:
            row = db.execute(_stored(key_id)).one()
        return Stored(row.files, row.size_bytes)

    def page(self, key_id: str, *, number: int, size: int) -> list[UploadRecord]:
        """The page ``number`` (from 1) of ``size`` files, newest first."""
        query = (
            select(*_COLUMNS)
            .where(uploads.c.key_id == key_id)
            .order_by(uploads.c.created_at.desc(), uploads.c.id.desc())
            .limit(size)
            .offset((number - 1) * size)
        )
        with self._reader.connect() as db:
            return [UploadRecord(*row) for row in db.execute(query)]

    def find(self, key_id: str, ids: Collection[str]) -> list[UploadRecord]:
        """Those of ``ids`` that are the key's."""
        query = select(*_COLUMNS).where(uploads.c.key_id == key_id, uploads.c.id.in_(ids))
        with self._reader.connect() as db:
            return [UploadRecord(*row) for row in db.execute(query)]

    def forget(self, ids: Sequence[str]) -> int:
        """Delete rows; returns how many there were."""
        with self._database.begin() as db:
            return int(db.execute(delete(uploads).where(uploads.c.id.in_(ids))).rowcount)

    def forget_expired(self, *, announced: float, stored: float) -> int:
        """Delete the rows whose time ended before these times, of files that came or did not."""
        has_come = uploads.c.stored_at.is_not(None)
        old = or_(
            (uploads.c.expires_at < announced) & ~has_come,
            (uploads.c.expires_at < stored) & has_come,
        )
        with self._database.begin() as db:
            return int(db.execute(delete(uploads).where(old)).rowcount)


def _stored(key_id: str) -> Select[Any]:
    size = func.coalesce(func.sum(uploads.c.size_bytes + FILE_BYTES), 0).label("size_bytes")
    return select(func.count().label("files"), size).where(uploads.c.key_id == key_id)
