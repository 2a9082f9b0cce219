"""``flux-redux keys``: create, list, revoke."""

import sys
from datetime import UTC, datetime

from redux_server.auth import KeyRing
from redux_server.cli import UsageError
from redux_server.database import open_database
from redux_server.settings import ServerSettings

MAX_PRIORITY = 10
_MAX_NAME = 128


def create(settings: ServerSettings, name: str, priority: int) -> int:
    """Make a key; it is the last line printed, so that a script can take it."""
    if abs(priority) > MAX_PRIORITY:
        raise UsageError(f"--priority must be -{MAX_PRIORITY} to {MAX_PRIORITY}, got {priority}")
    if len(name) > _MAX_NAME:
        raise UsageError(f"--name may have {_MAX_NAME} characters, got {len(name)}")
    key = _ring(settings).create(name, priority=priority)
    print(f"Key for {name!r}; it is not stored and not shown again:", file=sys.stderr)
    print(key)
    return 0


def list_keys(settings: ServerSettings) -> int:
    """One line a key: id, when it was made, whether it is valid, its priority, name."""
    for key in _ring(settings).list():
        made = datetime.fromtimestamp(key.created_at, UTC).strftime("%Y-%m-%d %H:%M")
        state = "revoked" if key.revoked_at else "valid"
        print(f"{key.id}  {made}  {state:<7}  {key.priority:>3}  {key.name}")
    return 0


def revoke(settings: ServerSettings, key_id: str) -> int:
    """Make a key useless; running servers notice within two seconds."""
    if _ring(settings).revoke(key_id):
        print(f"revoked {key_id}")
        return 0
    print(f"flux-redux: no valid key {key_id!r}; see `flux-redux keys list`", file=sys.stderr)
    return 1


def _ring(settings: ServerSettings) -> KeyRing:
    return KeyRing(open_database(settings.database))
