"""``flux-redux keys``, ``db``, ``tasks``, ``weights``: what is administered beside a server.

Works on the database and on checkpoints themselves, so it needs no server. Loads no pipeline until
weights are converted.
"""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Engine

from redux_pipelines.errors import ReduxError
from redux_server.api.auth import KeyRing
from redux_server.api.fleet import Fleet
from redux_server.cli.progress import ProgressReport, note
from redux_server.database.clock import clock_of
from redux_server.database.connection import connect, shown
from redux_server.database.migration import (
    SCHEMA_VERSION,
    open_database,
    schema_version,
    upgrade_database,
)
from redux_server.dispatch.fingerprint import described
from redux_server.dispatch.presence import Presence
from redux_server.settings import ModelSettings, ServerSettings, UsageError
from redux_server.tasks.listing import last_submits
from redux_server.tasks.store import TaskStore
from redux_weights.layout import BASE_FILES

MAX_PRIORITY = 10
_MAX_NAME = 128
_MEBIBYTE = 2**20


# --- Keys -----------------------------------------------------------------------------------------


def create(settings: ServerSettings, name: str, priority: int) -> int:
    """Make a key; it is the last line printed, so that a script can take it."""
    if abs(priority) > MAX_PRIORITY:
        raise UsageError(f"--priority must be -{MAX_PRIORITY} to {MAX_PRIORITY}, got {priority}")
    name = name.strip()
    if len(name) > _MAX_NAME:
        raise UsageError(f"--name may have {_MAX_NAME} characters, got {len(name)}")
    if not name or not name.isprintable():
        raise UsageError(
            f"--name must be 1 to {_MAX_NAME} characters on one line, without control characters; "
            f"got {name!a}"
        )
    with _database(settings, upgrade=True) as database:
        key = KeyRing(database).create(name, priority=priority)
    print(f"Key for {name!r}; it is not stored and not shown again:", file=sys.stderr)
    print(key)
    return 0


def list_keys(settings: ServerSettings) -> int:
    """A header, and one line a key; times are in UTC."""
    with _database(settings, upgrade=True) as database:
        keys = KeyRing(database).list()
        used = last_submits(database, [key.id for key in keys])
    if not keys:
        note("no keys yet; `flux-redux keys create --name me` makes one")
        return 0
    print(_LINE.format("id", "made", "last task", "state", "priority", "name"))
    for key in keys:
        last = _minute(used[key.id]) if key.id in used else "-"
        state = "revoked" if key.revoked_at else "valid"
        made = _minute(key.created_at)
        print(_LINE.format(key.id, made, last, state, key.priority, _printable(key.name)))
    return 0


_LINE = "{:<8}  {:<16}  {:<16}  {:<7}  {:>8}  {}"


def _minute(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M")


def _printable(name: str) -> str:
    """``name`` on one line: one of a former version may forge lines and move the cursor."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return shown or "(no name)"


def revoke(settings: ServerSettings, key_id: str) -> int:
    """Make a key useless; running servers notice within two seconds."""
    with _database(settings, upgrade=True) as database:
        is_revoked = KeyRing(database).revoke(key_id)
    if is_revoked:
        print(f"revoked {key_id}")
        return 0
    note(f"no valid key {key_id!r}; see `flux-redux keys list`")
    return 1


# --- The database ---------------------------------------------------------------------------------


def current(settings: ServerSettings) -> int:
    """Print the version of the tables and the one this program needs; 1 when they differ."""
    with _database(settings) as database:
        found = schema_version(database)
        print(f"{shown(database.url)}: {found or 'no tables'} (this flux-redux: {SCHEMA_VERSION})")
    return 0 if found == SCHEMA_VERSION else 1


def upgrade(settings: ServerSettings) -> int:
    """Bring the tables up to date; all of it or nothing."""
    with _database(settings) as database:
        before, after = upgrade_database(database)
        done = "is up to date" if before == after else f"upgraded from {before or 'nothing'}"
        print(f"{shown(database.url)}: {after}, {done}")
    return 0


@contextmanager
def _database(settings: ServerSettings, *, upgrade: bool = False) -> Iterator[Engine]:
    """The database; with ``upgrade``, its tables are made or brought up to date if need be."""
    database = open_database(settings.database) if upgrade else connect(settings.database)
    try:
        yield database
    finally:
        database.dispose()


# --- Tasks ----------------------------------------------------------------------------------------


def unbind(settings: ServerSettings) -> int:
    """Let any worker take the tasks that wait for what no ready worker runs; prints how many."""
    database = open_database(settings.database)
    try:
        store, clock = TaskStore(database), clock_of(database)
        fleet = Fleet(tuple(Presence(database, clock=clock).all()))
        if not fleet.ready:
            raise UsageError(
                "no worker is ready, so nobody can say which tasks none would take; start one first"
            )
        unserved = fleet.unserved(store.bound())
        count = store.unbind(unserved)
    finally:
        database.dispose()
    for each in sorted(unserved):
        print(f"{described(each)}: no ready worker runs it")
    print(f"{count} tasks may be taken by any worker now")
    return 0


# --- Weights --------------------------------------------------------------------------------------


def quantize(settings: ModelSettings, out: str) -> int:
    """Write ``--base`` with its transformer in fp8 to the new folder ``out``; the exit code.

    Raises:
        UsageError: no base was named.
    """
    if not settings.base:
        raise UsageError("weights quantize needs --base: a diffusers folder or a Hub repository")
    from redux_pipelines.loading.fp8_export import quantize_checkpoint
    from redux_pipelines.loading.load import locate

    target = Path(out).expanduser().absolute()
    try:
        base = locate(
            settings.base, BASE_FILES, option="--base", revision=settings.revision or None
        )
        with closing(ProgressReport()) as progress:
            made = quantize_checkpoint(
                base,
                target,
                report=lambda done, total: progress.show(
                    "MiB written", done // _MEBIBYTE, total // _MEBIBYTE
                ),
            )
    except ReduxError as error:
        note(str(error))
        return 1
    note(
        f"the transformer's {made.before_bytes / 1e6:,.1f} MB are now "
        f"{made.after_bytes / 1e6:,.1f} MB; of the other files {made.linked} are hard links and "
        f"{made.copied} copies. The base's licence holds for the new weights too: that of FLUX.1 "
        "[dev] is non-commercial"
    )
    print(target)
    return 0
