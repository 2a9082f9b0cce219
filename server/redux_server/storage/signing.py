"""Signed file paths: the right to fetch one blob until a time, and the secret behind them.

The signature stands in the path, so that a URL still ends in a file name, and so that a URL of
ours is known as ours whatever host it came by. Knows no store.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import IntegrityError

from redux_server.database import tables
from redux_server.database.connection import reader
from redux_server.errors import Gone, NotFound
from redux_server.parameters import MAX_URL

_PATH = re.compile(r"/files/(?P<sig>[0-9a-f]{32})/(?P<exp>[0-9]{1,12})/(?P<key>[\w./-]{1,256})\Z")


class Signer:
    """Makes and checks ``/files/{signature}/{expiry}/{key}`` paths (HMAC-SHA-256, 128 bits)."""

    def __init__(self, secret: bytes, *, clock: Callable[[], float]) -> None:
        self._secret = secret
        self._clock = clock

    def path(self, key: str, expires_at: float) -> str:
        """The path of ``key``, valid until ``expires_at`` (Unix seconds)."""
        expiry = int(expires_at)
        return f"/files/{self._signature(key, expiry)}/{expiry}/{key}"

    def key_of(self, url: str) -> str | None:
        """The blob key in a URL that we signed, expired or not; None for any other URL.

        A proxy may have put something before our path.
        """
        if len(url) > MAX_URL:
            return None
        try:
            match = _PATH.search(urlsplit(url).path)
        except ValueError:
            return None
        return self._key_in(match)

    def is_over(self, url: str) -> bool:
        """Whether the time of a URL that we signed is over."""
        match = _PATH.search(urlsplit(url).path)
        return match is not None and int(match["exp"]) < self._clock()

    def open_key(self, path: str) -> str:
        """The blob key of a path that is signed and not expired.

        Raises:
            NotFound: not a path of ours.
            Gone: the time is over.
        """
        match = _PATH.match(path)
        key = self._key_in(match)
        if match is None or key is None:
            raise NotFound("No such file.")
        if int(match["exp"]) < self._clock():
            raise Gone("This file was kept for a limited time, which is over; run the task again.")
        return key

    def seal(self, purpose: str, text: str) -> str:
        """32 hex digits that only we can make of ``text``, and only for ``purpose``."""
        return self._digest(f"{purpose}:{text}")  # a file's message begins with digits and a slash

    def _key_in(self, match: "re.Match[str] | None") -> str | None:
        if match is None:
            return None
        expected = self._signature(match["key"], int(match["exp"]))
        return match["key"] if hmac.compare_digest(expected, match["sig"]) else None

    def _signature(self, key: str, expiry: int) -> str:
        return self._digest(f"{expiry}/{key}")

    def _digest(self, message: str) -> str:
        return hmac.new(self._secret, message.encode(), hashlib.sha256).hexdigest()[:32]


def signing_secret(database: Engine) -> bytes:
    """The secret behind file URLs: made at the first start, shared by all who use the database."""
    return bytes.fromhex(shared_value(database, "file-urls"))


def shared_value(database: Engine, name: str) -> str:
    """64 random hex digits under ``name``, made when they are first asked for."""
    query = select(tables.secrets.c.value).where(tables.secrets.c.name == name)
    with reader(database).connect() as db:
        found = db.scalar(query)
    if found is not None:
        return str(found)
    try:
        with database.begin() as db:
            value = secrets.token_hex(32)
            db.execute(insert(tables.secrets), {"name": name, "value": value})
    except IntegrityError:  # another process was first
        return shared_value(database, name)
    return value
