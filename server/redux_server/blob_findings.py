"""What ``flux-redux doctor`` finds of where pictures are kept. Looks only: writes nothing."""

from collections.abc import Iterator

from redux_server.blobs import StorageError
from redux_server.buckets import BlobUrlError, BucketBlobs, local_folder
from redux_server.findings import Finding, Level, check_space
from redux_server.settings import ServerSettings

_LITTLE_SPACE_BYTES = 2 * 2**30


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


def check_floor(settings: ServerSettings, free_bytes: int) -> Iterator[Finding]:
    """Whether so much free space is above ``--min-free-disk``."""
    if free_bytes < settings.min_free_disk * 2**20:
        text = (
            f"{free_bytes >> 20} MiB free, below --min-free-disk {settings.min_free_disk}: every "
            "submit would be answered 503; make room, or lower it"
        )
        yield Finding(Level.MISSING, "disk space", text)
