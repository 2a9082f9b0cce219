"""What ``flux-redux doctor`` finds of the host: packages, data directory, pictures, port, keys.

Of what several machines share, too: the database and what ``--dispatch`` needs. Makes no folder and
writes no picture. Knows neither GPUs nor models.
"""

import errno
import os
import platform
import re
import shutil
import socket
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path

import httpx

from redux_server import __version__
from redux_server.api.auth import KeyFileError, KeyRing, read_keys_file
from redux_server.cli.doctor.findings import Finding, Level, check_space, existing
from redux_server.database.clock import MAX_JUMP_S, clock_of, jump_since_believed
from redux_server.database.connection import DatabaseUnusable, shown
from redux_server.database.migration import open_database
from redux_server.dispatch.choice import check_dispatch
from redux_server.pictures.decode import confinement_gap
from redux_server.private_files import is_open_to_others
from redux_server.settings import ServerSettings, UsageError
from redux_server.storage.blobs import MARKER, StorageError
from redux_server.storage.buckets import BlobUrlError, BucketBlobs
from redux_server.storage.opening import local_folder, open_blobs
from redux_server.storage.owner import database_id, marked_as

_PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "sqlalchemy", "fastapi")
NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs"}
    | {"fuse.sshfs", "fuse.s3fs"}
)
_LITTLE_SPACE_BYTES = 2 * 2**30


def check_python(_settings: ServerSettings) -> Iterator[Finding]:
    """Interpreter, operating system and our own version."""
    yield Finding(Level.OK, "flux-redux", __version__)
    yield Finding(Level.OK, "python", f"{platform.python_version()} on {platform.platform()}")


def check_packages(_settings: ServerSettings) -> Iterator[Finding]:
    """Versions of what we stand on, without importing it."""
    for name in _PACKAGES:
        try:
            yield Finding(Level.OK, name, package_version(name))
        except PackageNotFoundError:
            yield Finding(
                Level.MISSING, name, "not installed; run `pip install flux-redux-server` again"
            )
    try:
        yield Finding(Level.OK, "triton", package_version("triton"))
    except PackageNotFoundError:
        yield Finding(Level.NOTE, "triton", "not installed: plain torch is used, slower on a GPU")


def check_data_dir(settings: ServerSettings) -> Iterator[Finding]:
    """Whether tasks and images can be kept there: rights, file system, space."""
    folder = settings.data_dir
    place = existing(folder)
    if not place.is_dir():
        yield Finding(Level.MISSING, "data dir", f"{place} is a file; choose another --data-dir")
        return
    if not os.access(place, os.W_OK | os.X_OK):
        text = f"{place} cannot be written by this user; choose another --data-dir"
        yield Finding(Level.MISSING, "data dir", text)
        return
    is_new = "" if place == folder else " (serve will create it)"
    kind = filesystem_of(place)
    yield Finding(Level.OK, "data dir", f"{folder}{is_new}, on {kind}")
    if place == folder and is_open_to_others(folder):
        text = (
            "others may look into it: serve closes it if it is its owner's and no home directory "
            "(chmod 700 does so now)"
        )
        yield Finding(Level.NOTE, "data dir", text)
    if kind in NETWORK_FILESYSTEMS:
        text = f"{kind} is a network file system, where SQLite's locks fail; use a local disk"
        yield Finding(Level.NOTE, "data dir", text)
    yield from check_space("disk space", folder, _LITTLE_SPACE_BYTES)
    yield from check_floor(settings, shutil.disk_usage(place).free)


def check_floor(settings: ServerSettings, free_bytes: int) -> Iterator[Finding]:
    """Whether so much free space is above ``--min-free-disk``."""
    if free_bytes < settings.min_free_disk * 2**20:
        text = (
            f"{free_bytes >> 20} MiB free, below --min-free-disk {settings.min_free_disk}: every "
            "submit would be answered 503; make room, or lower it"
        )
        yield Finding(Level.MISSING, "disk space", text)


def filesystem_of(path: Path, *, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that holds ``path``, such as ``ext4``; proc(5) has the format."""
    target = path.resolve()
    best, kind = -1, "an unknown file system"
    for line in mounts.read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4]))
        if target.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), right.split()[0]
    return kind


def check_confinement(_settings: ServerSettings) -> Iterator[Finding]:
    """Whether the kernel holds the process that decodes strangers' pictures to a list of calls."""
    gap = confinement_gap()
    if gap:
        text = (
            f"no filter for system calls ({gap}): code that breaks a picture decoder could reach "
            "files and the network as this user; run the server in a container or a machine apart"
        )
        yield Finding(Level.NOTE, "decoding", text)
    else:
        yield Finding(Level.OK, "decoding", "in processes held to a list of system calls (seccomp)")


def check_pictures(settings: ServerSettings) -> Iterator[Finding]:
    """Whether ``--blob-url`` names a store that answers; nothing of the usual folder."""
    url = settings.blob_url
    try:
        folder = local_folder(url, settings.blobs_dir)
        if not url:
            return
        if folder is not None:
            yield Finding(Level.OK, "pictures", str(folder))
            yield from check_space("pictures", folder, _LITTLE_SPACE_BYTES)
            return
        BucketBlobs(url).look()
    except BlobUrlError as error:
        yield Finding(Level.MISSING, "pictures", f"--blob-url {error}")
    except StorageError as error:
        yield Finding(Level.MISSING, "pictures", str(error))
    else:
        text = f"{url} answers (whether it can be written, serve tries when it starts)"
        yield Finding(Level.OK, "pictures", text)


def check_cluster(settings: ServerSettings) -> Iterator[Finding]:
    """Whether a database that was named can be used, and ``--dispatch`` has what it needs."""
    if settings.database_url:
        try:
            database = open_database(settings.database)
        except DatabaseUnusable as error:
            yield Finding(Level.MISSING, "database", str(error))
        else:
            yield Finding(Level.OK, "database", shown(database.url))
            database.dispose()
    if settings.dispatch != "local":
        try:
            check_dispatch(settings)
        except UsageError as error:
            yield Finding(Level.MISSING, "dispatch", str(error))
        else:
            yield Finding(Level.OK, "dispatch", settings.dispatch)


def check_sweeps(settings: ServerSettings) -> Iterator[Finding]:
    """Whether what is old would be deleted: the date is believed, and the pictures are ours."""
    if not settings.database_url and not (settings.data_dir / "tasks.db").exists():
        return
    try:
        database = open_database(settings.database)
    except DatabaseUnusable:
        return  # told already
    try:
        jump_s = jump_since_believed(database, clock_of(database)())
        if abs(jump_s) > MAX_JUMP_S:
            text = (
                f"it is off by {jump_s / 86400:.1f} days from when a server last believed it, so "
                "nothing old is deleted until it has gone on for an hour; put it right if it is "
                "wrong"
            )
            yield Finding(Level.NOTE, "date", text)
        found = _mark_of(settings)
        if found is not None and found != (own_id := database_id(database)):
            text = (
                f"they belong to another database ({found}), so none is deleted for its age; use "
                f"another --blob-url, or write {own_id} into {MARKER} there"
            )
            yield Finding(Level.NOTE, "pictures", text)
    finally:
        database.dispose()


def _mark_of(settings: ServerSettings) -> str | None:
    """Whose pictures they are; None where nobody has said so, or none are there yet."""
    folder = local_folder(settings.blob_url, settings.blobs_dir)
    if folder is not None and not folder.is_dir():
        return None
    try:
        return marked_as(open_blobs(settings.blob_url, settings.blobs_dir))
    except (BlobUrlError, OSError):
        return None  # told already


def check_port(settings: ServerSettings) -> Iterator[Finding]:
    """Whether ``serve`` could listen where it is told to."""
    place = f"{settings.host}:{settings.port}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and _is_ours(settings):
                text = f"a FLUX Redux Server is running on {place} already"
                yield Finding(Level.NOTE, "port", text)
            else:
                text = f"cannot listen on {place} ({error.strerror}); choose another --port"
                yield Finding(Level.MISSING, "port", text)
        else:
            yield Finding(Level.OK, "port", f"{place} is free")


def _is_ours(settings: ServerSettings) -> bool:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        answer = httpx.get(f"http://{host}:{settings.port}/version", timeout=2.0, trust_env=False)
        return {"version", "model"} <= set(answer.json())
    except (httpx.HTTPError, ValueError, TypeError):
        return False


def check_api_keys(settings: ServerSettings) -> Iterator[Finding]:
    """Whether anybody could use the server."""
    count = 0
    if settings.api_keys_file:
        try:
            count = len(read_keys_file(Path(settings.api_keys_file)))
        except KeyFileError as error:
            yield Finding(Level.MISSING, "API keys", str(error))
            return
    if settings.database_url or (settings.data_dir / "tasks.db").exists():
        try:
            database = open_database(settings.database)
        except DatabaseUnusable:
            yield Finding(Level.NOTE, "API keys", "cannot be counted: see the database")
            return
        count += sum(not key.revoked_at for key in KeyRing(database).list())
        database.dispose()
    if count:
        yield Finding(Level.OK, "API keys", f"{count} valid")
    elif settings.is_loopback:
        yield Finding(Level.NOTE, "API keys", "none yet: serve makes the first and shows it")
    else:
        text = (
            f"none, so serve refuses to listen on {settings.host}; make one: "
            f"flux-redux keys create --name me --data-dir {settings.data_dir}"
        )
        yield Finding(Level.MISSING, "API keys", text)
