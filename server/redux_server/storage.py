"""The parts that keep bytes, built from settings: the store of pictures, the disk, its ballast."""

from redux_server.blobs import BlobStore
from redux_server.buckets import local_folder, open_blobs
from redux_server.disk import BALLAST_BYTES, Ballast, DiskSpace
from redux_server.settings import ServerSettings


def open_pictures(settings: ServerSettings) -> BlobStore:
    """The store of pictures; sends nothing yet.

    While there is a floor for free space, a folder leaves what the ballast is for to the database.
    """
    keep_free_bytes = BALLAST_BYTES if settings.min_free_disk else 0
    return open_blobs(settings.blob_url, settings.blobs_dir, keep_free_bytes=keep_free_bytes)


def disk_space(settings: ServerSettings) -> DiskSpace:
    """The room in the data directory, and in the folder of pictures if there is one elsewhere."""
    folder = local_folder(settings.blob_url, settings.blobs_dir)
    folders = {settings.data_dir, folder or settings.data_dir}
    return DiskSpace(folders, floor_bytes=settings.min_free_disk * 2**20)


def open_ballast(settings: ServerSettings) -> Ballast:
    """The ballast of the data directory; none where there is no floor for free space."""
    return Ballast(settings.ballast_path, BALLAST_BYTES if settings.min_free_disk else 0)
