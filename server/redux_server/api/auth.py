"""API keys, and the middleware that asks for one.

Only SHA-256 digests are stored; keys carry 192 random bits, so a slow hash would add nothing.
"""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy import Engine, insert, select, update
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redux_server.database.connection import DATABASE_AWAY, WrongTables, reader
from redux_server.database.tables import keys
from redux_server.errors import Unauthorized, Unavailable, error_response, wrong_tables

KEY_PREFIX = "frs_"
_MAX_FILE_NAME = 59  # with what we put before it, what the column of a task's key takes
_CACHE_S = 2.0  # how long a revoked key may still pass
_CACHE_SIZE = 1024
_log = structlog.get_logger("redux_server.api.auth")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A stored key, without its secret. ``created_at`` and ``revoked_at`` are Unix seconds."""

    id: str
    name: str
    created_at: float
    revoked_at: float | None
    priority: int = 0


class KeyFileError(Exception):
    """A keys file that cannot be used."""


class KeyRing:
    """Creates, lists, revokes and recognises keys: those in the database and those of a file."""

    def __init__(
        self, database: Engine, *, file: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._reader = reader(database)
        self._clock = clock
        self._from_file = read_keys_file(Path(file)) if file else {}
        self._cache: dict[str, tuple[float, str | None]] = {}

    def create(self, name: str, *, priority: int = 0) -> str:
        """Make a key and return it; this is the only time it can be read.

        Tasks of a higher ``priority`` are worked on first; that of keys in a file is 0.
        """
        key = KEY_PREFIX + secrets.token_urlsafe(24)
        row = {
            "id": secrets.token_hex(4),
            "name": name,
            "digest": _digest(key),
            "created_at": self._clock(),
            "priority": priority,
        }
        with self._database.begin() as db:
            db.execute(insert(keys), row)
        return key

    def list(self) -> list[ApiKey]:
        """All keys of the database, oldest first."""
        query = select(*(keys.c[name] for name in ApiKey.__slots__)).order_by(keys.c.created_at)
        with self._reader.connect() as db:
            return [ApiKey(*row) for row in db.execute(query)]

    def revoke(self, key_id: str) -> bool:
        """Make a key useless. False when there is no such key, or it was revoked before."""
        live = keys.c.id == key_id, keys.c.revoked_at.is_(None)
        with self._database.begin() as db:
            changed = db.execute(update(keys).where(*live).values(revoked_at=self._clock()))
        self._cache.clear()
        return bool(changed.rowcount)

    def is_empty(self) -> bool:
        """True when nobody could pass."""
        return not self._from_file and all(key.revoked_at for key in self.list())

    def remembers(self, key: str) -> bool:
        """Whether ``recognise`` would answer without asking the database."""
        cached = self._cache.get(_digest(key))
        return cached is not None and 0 <= self._clock() - cached[0] < _CACHE_S

    def recognise(self, key: str) -> str | None:
        """The id of the owner of ``key``, or None."""
        digest = _digest(key)
        cached = self._cache.get(digest)
        if cached is not None and 0 <= self._clock() - cached[0] < _CACHE_S:
            return cached[1]
        owner = self._look_up(digest)
        if len(self._cache) >= _CACHE_SIZE:
            self._cache.clear()
        self._cache[digest] = (self._clock(), owner)
        return owner

    def revoked_of(self, key_ids: Set[str]) -> set[str]:
        """Those of ``key_ids`` that nobody can use any more; a key in a file stays valid."""
        stored = {key_id for key_id in key_ids if key_id not in self._from_file.values()}
        if not stored:
            return set()
        query = select(keys.c.id).where(keys.c.id.in_(stored), keys.c.revoked_at.is_(None))
        with self._reader.connect() as db:
            return stored - set(db.scalars(query))

    def _look_up(self, digest: str) -> str | None:
        for known, owner in self._from_file.items():
            if hmac.compare_digest(known, digest):
                return owner
        query = select(keys.c.id, keys.c.digest).where(
            keys.c.digest == digest, keys.c.revoked_at.is_(None)
        )
        with self._reader.connect() as db:
            row = db.execute(query).one_or_none()
        if row is not None and hmac.compare_digest(row.digest, digest):
            return str(row.id)
        return None


def read_keys_file(path: Path) -> dict[str, str]:
    """Owner ids by key digest, from lines of ``name:key``; ``#`` starts a comment.

    Raises:
        KeyFileError: the file cannot be read, or a line is not ``name:key`` with a key of at
            least 16 characters.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read --api-keys-file {path}: {error}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, colon, key = text.partition(":")
        is_name = 0 < len(name.strip()) <= _MAX_FILE_NAME and name.strip().isprintable()
        if not colon or not is_name or len(key.strip()) < 16:
            raise KeyFileError(
                f"{path}, line {number}: expected name:key with a key of 16 characters or more "
                f"and a name of at most {_MAX_FILE_NAME}"
            )
        found[_digest(key.strip())] = f"file:{name.strip()}"
    return found


class AuthMiddleware:
    """Lets nothing under ``/api/`` through without a key; puts its id in ``request.state.key_id``.

    Stands before body parsing, so a stranger cannot make us read an upload. ``recognise`` runs on a
    thread, because a database can take its time, but for keys that it ``remembers``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        recognise: Callable[[str], str | None],
        remembers: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._app = app
        self._recognise = recognise
        self._remembers = remembers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or not scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return
        key = _bearer(scope)
        began_at = time.monotonic()

        async def receive_of_valid_key() -> Message:
            """A body may take minutes to come: its end counts only if the key still does."""
            message = await receive()
            is_end = message["type"] == "http.request" and not message.get("more_body")
            if is_end and time.monotonic() - began_at > _CACHE_S:
                await self._owner_of(key)
            return message

        try:
            key_id = await self._owner_of(key)
        except (Unauthorized, Unavailable) as error:
            response = error_response(error.status, error.message, error.name, error.headers)
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["key_id"] = key_id
        await self._app(scope, receive_of_valid_key, send)

    async def _owner_of(self, key: str) -> str:
        """Whose key it is; raises Unauthorized or Unavailable."""
        try:
            if not key or self._remembers(key):
                key_id = self._recognise(key) if key else None
            else:
                key_id = await asyncio.to_thread(self._recognise, key)
        except WrongTables as error:
            _log.error("the database cannot be used", reason=str(error))
            raise wrong_tables() from None
        except DATABASE_AWAY:
            raise Unavailable(
                "The key cannot be checked: the database does not answer.",
                headers={"Retry-After": "2"},
            ) from None
        if key_id is None:
            raise Unauthorized(_refusal(key), headers={"WWW-Authenticate": "Bearer"})
        return key_id


def _bearer(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            return key.strip() if scheme.lower() == "bearer" else ""
    return ""


def _refusal(key: str) -> str:
    if key:
        return (
            "Unknown or revoked API key. Send one that is valid, whole, in the header "
            "`Authorization: Bearer <key>`; whoever runs this server can give you one."
        )
    return (
        "API key missing. Send yours in the header `Authorization: Bearer <key>`; whoever runs "
        "this server can give you one."
    )


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
