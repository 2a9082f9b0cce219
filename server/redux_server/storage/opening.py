"""From settings to what keeps bytes: the store of pictures, the disk, its ballast.

Holds what ``--blob-url`` means. Opens nothing over the network; ``BlobStore.check`` does.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from redux_server.settings import ServerSettings
from redux_server.storage.blobs import Blobs, BlobStore
from redux_server.storage.buckets import BlobUrlError, BucketBlobs
from redux_server.storage.disk import BALLAST_BYTES, Ballast, DiskSpace

_BUCKET_SCHEMES = frozenset({"s3", "gs", "az"})
_FORMS = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///folder"


def open_pictures(settings: ServerSettings) -> BlobStore:
    """The store of pictures; sends nothing yet.

    While there is a floor for free space, a folder leaves what the ballast is for to the database.
    """
    keep_free_bytes = BALLAST_BYTES if settings.min_free_disk else 0
    return open_blobs(settings.blob_url, settings.blobs_dir, keep_free_bytes=keep_free_bytes)


def disk_space(settings: ServerSettings) -> DiskSpace:
    """The room in the data directory, and in the folder of pictures if there is one elsewhere.

    What is temporary lies in the data directory, and needs no look of its own.
    """
    folder = local_folder(settings.blob_url, settings.blobs_dir)
    folders = {settings.data_dir, folder or settings.data_dir}
    return DiskSpace(folders, floor_bytes=settings.min_free_disk * 2**20)


def open_ballast(settings: ServerSettings) -> Ballast:
    """The ballast of the data directory; none where there is no floor for free space."""
    return Ballast(settings.ballast_path, BALLAST_BYTES if settings.min_free_disk else 0)


def open_blobs(
    url: str,
    default: Path,
    *,
    keep_free_bytes: int = 0,
    environ: Mapping[str, str] = os.environ,
) -> BlobStore:
    """The store that ``--blob-url`` names; ``default`` is the folder for an empty one.

    ``keep_free_bytes`` is for a folder, see ``Blobs``. Sends nothing; ``check`` does.

    Raises:
        BlobUrlError: not a URL of a store that can be used.
    """
    folder = local_folder(url, default)
    if folder is not None:
        return Blobs(folder, keep_free_bytes=keep_free_bytes)
    return BucketBlobs(url, environ=environ)


def local_folder(url: str, default: Path) -> Path | None:
    """The folder that ``--blob-url`` names, or None for a bucket.

    Raises:
        BlobUrlError: neither.
    """
    if not url:
        return default
    try:
        parts = urlsplit(url)
    except ValueError:
        raise BlobUrlError(f"must be {_FORMS}; got {url!r}") from None
    if "@" in parts.netloc:  # not shown: it may hold a password
        raise BlobUrlError(f"must be {_FORMS}, without credentials, which belong in variables")
    if parts.query or parts.fragment:
        raise BlobUrlError(f"must be {_FORMS}, with nothing behind; got {url!r}")
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and len(parts.path) > 1:
        return Path(unquote(parts.path))
    if parts.scheme in _BUCKET_SCHEMES and parts.netloc:
        return None
    raise BlobUrlError(f"must be {_FORMS}; got {url!r}")
