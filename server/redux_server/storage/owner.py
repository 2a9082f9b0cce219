"""Whose store of pictures it is: it carries the id of its database.

Two servers may be given one folder or prefix by mistake, and a database may be another one than
yesterday. Then what its tasks do not know is not stray, but another's. Knows no task but by name.
"""

from collections.abc import Callable, Sequence

import structlog
from sqlalchemy import Engine

from redux_server.storage.blobs import MARKER, BlobStore, StorageError
from redux_server.storage.signing import shared_value

_MOST_ASKED = 500
_log = structlog.get_logger("redux_server.storage.owner")


def database_id(database: Engine) -> str:
    """32 hex digits, made at the first start and kept in backups of the database."""
    return shared_value(database, "database-id")[:32]


def marked_as(blobs: BlobStore) -> str | None:
    """The id of the database that ``blobs`` belong to; None where nobody has said so yet."""
    try:
        return blobs.get(MARKER).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None


class StoreOwner:
    """Tells whether a store is ours, and marks one that is nobody's.

    ``knows_any`` says whether the database has any of these tasks. ``where`` is the store's name
    for people.
    """

    def __init__(
        self,
        blobs: BlobStore,
        own_id: str,
        *,
        knows_any: Callable[[Sequence[str]], bool],
        where: str,
    ) -> None:
        self._blobs = blobs
        self._own_id = own_id
        self._knows_any = knows_any
        self._where = where
        self.is_foreign = False
        """What the last look has found."""

    def look(self, tasks: Callable[[], Sequence[str]]) -> bool:
        """Whether the store is ours; ``tasks`` gives those that it has something of.

        Raises:
            StorageError: it does not answer.
        """
        found = marked_as(self._blobs)
        if found is None:
            found = self._mark(tasks())
        self.is_foreign = found != self._own_id
        if self.is_foreign:
            _log.warning(
                "the pictures belong to another database, so none is deleted for its age or for "
                f"want of a task; give each server a --blob-url of its own, or stop this one and "
                f"write its id into {MARKER} there if no other uses them",
                where=self._where,
                belongs_to=found or "unknown",
                own_id=self._own_id,
            )
        return not self.is_foreign

    def _mark(self, tasks: Sequence[str]) -> str:
        # One that was filled before stores were marked, or whose mark was lost: ours if we know
        # what is in it.
        batches = [tasks[at : at + _MOST_ASKED] for at in range(0, len(tasks), _MOST_ASKED)]
        if tasks and not any(self._knows_any(batch) for batch in batches):
            return ""
        try:
            self._blobs.create(MARKER, self._own_id.encode())
        except FileExistsError:
            return marked_as(self._blobs) or ""
        except StorageError as error:  # full, perhaps: sweeping makes room
            _log.warning("the store of pictures could not be marked as ours", reason=str(error))
        return self._own_id
