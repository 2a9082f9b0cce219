"""Pictures on disk, and the signed URLs under which anyone may fetch them.

A key is ``{task}/{attempt}/{name}``: a worker that was given up for dead writes under its own
attempt and never over its successor's output. The signature stands in the path, so that a URL
still ends in a file name, and so that a URL of ours is known as ours whatever host it came by.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import obstore
from obstore.store import LocalStore
from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import IntegrityError

from redux_server import database
from redux_server.errors import Gone, NotFound

_PATH = re.compile(r"/files/(?P<sig>[0-9a-f]{32})/(?P<exp>[0-9]{1,12})/(?P<key>[\w./-]{1,256})")


class Blobs:
    """Named byte strings in a folder.

    Writes are atomic (a reader sees all of a blob or none) and flushed: what a task's row says is
    there is there after a power cut too.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._store = LocalStore(folder, automatic_cleanup=True)

    def put(self, key: str, data: bytes) -> None:
        """Store ``data`` under ``key``, replacing what was there."""
        obstore.put(self._store, key, data)
        path = self._folder / key
        while path != self._folder.parent:
            _flush(path)
            path = path.parent

    def get(self, key: str) -> bytes:
        """The bytes under ``key``.

        Raises:
            FileNotFoundError: there are none.
        """
        return bytes(obstore.get(self._store, key).bytes())

    def delete_under(self, prefix: str) -> None:
        """Delete every blob whose key starts with the path ``prefix``."""
        for chunk in obstore.list(self._store, prefix):
            obstore.delete(self._store, [meta["path"] for meta in chunk])

    def tasks_before(self, when: float) -> set[str]:
        """The tasks whose newest blob was written before ``when`` (Unix seconds)."""
        newest: dict[str, float] = {}
        for chunk in obstore.list(self._store):
            for meta in chunk:
                task = meta["path"].split("/", 1)[0]
                written = meta["last_modified"].timestamp()
                newest[task] = max(written, newest.get(task, 0.0))
        return {task for task, written in newest.items() if written < when}


class Signer:
    """Makes and checks ``/files/{signature}/{expiry}/{key}`` paths (HMAC-SHA-256, 128 bits)."""

    def __init__(self, secret: bytes, *, clock: Callable[[], float]) -> None:
        self._secret = secret
        self._clock = clock

    def path(self, key: str, expires_at: float) -> str:
        """The path of ``key``, valid until ``expires_at`` (Unix seconds)."""
        expiry = int(expires_at)
        return f"/files/{self._signature(key, expiry)}/{expiry}/{key}"

    def key_of(self, url_or_path: str) -> str | None:
        """The blob key in a URL that we signed, expired or not; None for any other URL."""
        try:
            match = _PATH.fullmatch(urlsplit(url_or_path).path)
        except ValueError:
            return None
        if match is None:
            return None
        expected = self._signature(match["key"], int(match["exp"]))
        return match["key"] if hmac.compare_digest(expected, match["sig"]) else None

    def open_key(self, path: str) -> str:
        """The blob key of a path that is signed and not expired.

        Raises:
            NotFound: not a path of ours.
            Gone: the time is over.
        """
        key = self.key_of(path)
        if key is None:
            raise NotFound("No such file.")
        if int(path.split("/")[3]) < self._clock():
            raise Gone("This file was kept for a limited time, which is over; run the task again.")
        return key

    def _signature(self, key: str, expiry: int) -> str:
        message = f"{expiry}/{key}".encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()[:32]


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names are in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def signing_secret(engine: Engine) -> bytes:
    """The secret behind file URLs: made at the first start, shared by all who use the database."""
    with database.reader(engine).connect() as db:
        found = db.scalar(select(database.secrets.c.value).where(_IS_SIGNING))
    if found is not None:
        return bytes.fromhex(found)
    try:
        with engine.begin() as db:
            value = secrets.token_hex(32)
            db.execute(insert(database.secrets), {"name": "file-urls", "value": value})
    except IntegrityError:  # another process was first
        return signing_secret(engine)
    return bytes.fromhex(value)


_IS_SIGNING = database.secrets.c.name == "file-urls"
