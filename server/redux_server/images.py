"""From a task's image reference to pixels: our blobs or a guarded fetch, then a safe decode."""

from PIL.Image import Image

from redux_server.blobs import BlobStore, Signer
from redux_server.decode import decode_image
from redux_server.fetch import ImageFetcher

_BLOB = "blob:"


class ImageGone(Exception):
    """A picture that was ours once and is no longer kept."""


class ImageLoader:
    """Loads input pictures. Our own file URLs are read from the store, never over the network."""

    def __init__(self, blobs: BlobStore, signer: Signer, fetcher: ImageFetcher) -> None:
        self._blobs = blobs
        self._signer = signer
        self._fetcher = fetcher

    def load(self, reference: str) -> Image:
        """The picture, upright RGB without metadata.

        Raises:
            ImageGone: a blob or file URL of ours that was deleted.
            redux_server.fetch.FetchError: the URL was refused or could not be fetched.
            redux_server.decode.DecodeError: the bytes are no usable picture.
            redux_server.blobs.StorageError: our own store does not answer.
        """
        return decode_image(self._read(reference))

    def _read(self, reference: str) -> bytes:
        is_blob = reference.startswith(_BLOB)
        key = reference[len(_BLOB) :] if is_blob else self._signer.key_of(reference)
        if key is None:
            return self._fetcher.fetch(reference)
        try:
            return self._blobs.get(key)
        except FileNotFoundError:
            raise ImageGone(
                "The input image is no longer kept by this server, or its upload was not completed."
            ) from None
