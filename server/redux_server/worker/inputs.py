"""From a task's parameters to what a pipeline is asked for, with its pictures loaded.

A picture comes from our own blobs or by a guarded fetch, and is then decoded in a child process.
Knows no store of tasks and no device.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from PIL.Image import Image

from redux_pipelines.contract.types import GenerationRequest
from redux_server.net.fetch import ImageFetcher
from redux_server.net.guard import FetchError
from redux_server.parameters import parse_size
from redux_server.pictures.decode import DecodeError, decode_image
from redux_server.storage.blobs import BlobStore
from redux_server.storage.signing import Signer

_BLOB = "blob:"
_SAME = ("prompt", "seed", "num_inference_steps", "guidance_scale", "num_images")
_IF_GIVEN = ("quality", "redux_strength", "redux_pooling", "fit", "empty_prompt")


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
            redux_server.net.fetch.FetchError: the URL was refused or could not be fetched.
            redux_server.pictures.decode.DecodeError: the bytes are no usable picture.
            redux_server.storage.blobs.StorageError: our own store does not answer.
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


class Pictures(NamedTuple):
    """The pictures of a request."""

    image: Image
    images: tuple[Image, ...] = ()
    mask: Image | None = None


def generation_request(given: Mapping[str, Any], pictures: Pictures) -> GenerationRequest:
    """What ``PredictionRequest.parameters`` ask for."""
    width, height = parse_size(given["size"])
    return GenerationRequest(
        **pictures._asdict(),
        width=width,
        height=height,
        image_weights=tuple(given.get("image_weights", ())),
        **{name: given[name] for name in _SAME},
        **{name: given[name] for name in _IF_GIVEN if name in given},
    )


def load_pictures(load: Callable[[str], Image], given: Mapping[str, Any]) -> Pictures:
    """The pictures that ``given`` refers to; several side by side, so that a slow one costs once.

    Raises what ``load`` does, with the name of the picture where it is not ``image``.
    """
    references = {"image": given["image"]}
    for index, reference in enumerate(given.get("images", ())):
        references[f"images[{index}]"] = reference
    if "mask" in given:
        references["mask"] = given["mask"]
    if len(references) == 1:
        return Pictures(load(given["image"]))

    def load_named(name: str) -> Image:
        try:
            return load(references[name])
        except (FetchError, DecodeError, ImageGone) as error:
            raise _named(name, error) from error

    with ThreadPoolExecutor(len(references), thread_name_prefix="picture") as threads:
        loaded = dict(zip(references, threads.map(load_named, references), strict=True))
    mask = loaded.pop("mask", None)
    image, *images = loaded.values()
    return Pictures(image, tuple(images), mask)


def _named(name: str, error: FetchError | DecodeError | ImageGone) -> Exception:
    if name == "image":
        return error
    if isinstance(error, FetchError):
        return FetchError(error.reason, f"{name}: {error.public_message}")
    if isinstance(error, DecodeError):
        return DecodeError(error.reason, f"{name}: {error.public_message}")
    return ImageGone(f"{name}: {error}")
