"""From a task's parameters to what a pipeline is asked for, with its pictures loaded."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from PIL.Image import Image

from redux_pipelines.types import GenerationRequest
from redux_server.decode import DecodeError
from redux_server.images import ImageGone
from redux_server.netguard import FetchError
from redux_server.schemas import parse_size

_SAME = ("prompt", "seed", "num_inference_steps", "guidance_scale", "num_images")
_IF_GIVEN = ("quality", "redux_strength", "redux_pooling", "fit", "empty_prompt")


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
    for place, reference in enumerate(given.get("images", ())):
        references[f"images[{place}]"] = reference
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
