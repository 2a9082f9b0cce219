"""From a task's parameters to what a pipeline is asked for, with its pictures loaded.

A picture comes from our own blobs or by a guarded fetch, and is then decoded in a child process.
Knows no store of tasks and no device.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

from PIL.Image import Image

from redux_pipelines.contract.types import (
    LEAST_SIDE,
    GenerationRequest,
    PreprocessedPicture,
)
from redux_pipelines.images.rgb import grey
from redux_server.net.fetch import ImageFetcher
from redux_server.net.guard import FetchError
from redux_server.parameters import parse_size
from redux_server.pictures.decode import MAX_PIXELS, DecodeError, decode_and
from redux_server.storage.blobs import BlobStore
from redux_server.storage.signing import Signer
from redux_server.tasks.task import Task

T = TypeVar("T")
Seen = Image | PreprocessedPicture
See = Callable[[Image, Image | None], Seen]
"""What is kept of a picture, given its mask if it has one."""
_BLOB = "blob:"
_SAME = ("prompt", "seed", "num_inference_steps", "guidance_scale", "num_images")
_IF_GIVEN = ("quality", "redux_strength", "redux_pooling", "fit", "empty_prompt")


class ImageGone(Exception):
    """A picture that was ours once and is no longer kept."""


class ImageLoader:
    """Loads input pictures. Our own file URLs are read from the store, never over the network."""

    def __init__(
        self,
        blobs: BlobStore,
        signer: Signer,
        fetcher: ImageFetcher,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._max_pixels = max_pixels
        self._blobs = blobs
        self._signer = signer
        self._fetcher = fetcher

    def load(self, reference: str, use: Callable[[Image], T]) -> T:
        """What ``use`` makes of the picture, upright RGB without metadata.

        The picture itself should not outlive ``use``: what memory pictures have is bounded.

        Raises:
            ImageGone: a blob or file URL of ours that was deleted.
            redux_server.net.fetch.FetchError: the URL was refused or could not be fetched.
            redux_server.pictures.decode.DecodeError: the bytes are no usable picture.
            redux_server.pictures.decode.DecoderUnavailable: they could not be decoded now.
            redux_server.storage.blobs.StorageError: our own store does not answer.
        """
        return decode_and(use, self._read(reference), max_pixels=self._max_pixels)

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


def has_remote_pictures(task: Task) -> bool:
    """Whether a picture of the task is not in our store, or need not be."""
    given = task.input
    references = [given["image"], *given.get("images", ()), given.get("mask", _BLOB)]
    return not all(reference.startswith(_BLOB) for reference in references)


class Pictures(NamedTuple):
    """The pictures of a request."""

    image: Seen
    images: tuple[Seen, ...] = ()
    mask: Image | None = None


def generation_request(given: Mapping[str, Any], pictures: Pictures) -> GenerationRequest:
    """What ``PredictionRequest.parameters`` ask for."""
    width, height = parse_size(given["size"], LEAST_SIDE)
    return GenerationRequest(
        **pictures._asdict(),
        width=width,
        height=height,
        image_weights=tuple(given.get("image_weights", ())),
        **{name: given[name] for name in _SAME},
        **{name: given[name] for name in _IF_GIVEN if name in given},
    )


class Load(Protocol):
    """``ImageLoader.load``."""

    def __call__(self, reference: str, use: Callable[[Image], T], /) -> T:
        """What ``use`` makes of the picture."""
        ...


def load_pictures(
    load: Load, given: Mapping[str, Any], see: See = lambda image, mask: image
) -> Pictures:
    """What ``see`` makes of each picture that ``given`` refers to, and the mask in grey.

    Several side by side, so that a slow one costs once; but the mask is needed for the first.
    Raises what ``load`` and ``see`` do, with the name of the picture where it is not ``image``.
    """
    references = {"image": given["image"]}
    for index, reference in enumerate(given.get("images", ())):
        references[f"images[{index}]"] = reference
    if "mask" in given:
        references["mask"] = given["mask"]
    if len(references) == 1:
        return Pictures(load(given["image"], lambda image: see(image, None)))

    def load_named(name: str, use: Callable[[Image], T]) -> T:
        try:
            return load(references[name], use)
        except (FetchError, DecodeError, ImageGone) as error:
            raise _named(name, error) from error

    def load_seen(name: str) -> Seen:
        # Without a mask that cannot be had, its own error comes first.
        covering = None
        if mask and name == "image" and mask.exception() is None:
            covering = mask.result()
        return load_named(name, lambda image: see(image, covering))

    with ThreadPoolExecutor(len(references), thread_name_prefix="picture") as threads:
        mask = None
        if "mask" in references:
            mask = threads.submit(load_named, "mask", grey)
        image, *images = threads.map(load_seen, [name for name in references if name != "mask"])
    return Pictures(image, tuple(images), mask.result() if mask else None)


def _named(name: str, error: FetchError | DecodeError | ImageGone) -> Exception:
    if name == "image":
        return error
    if isinstance(error, FetchError):
        return FetchError(error.reason, f"{name}: {error.public_message}")
    if isinstance(error, DecodeError):
        return DecodeError(error.reason, f"{name}: {error.public_message}")
    return ImageGone(f"{name}: {error}")
