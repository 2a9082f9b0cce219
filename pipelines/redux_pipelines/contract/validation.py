"""Which requests a pipeline serves: one check that every pipeline, real or fake, applies.

Imports no torch. Limits live in ``redux_pipelines.contract.types``.
"""

import math
from collections.abc import Sequence

from PIL import Image

from redux_pipelines.contract.types import (
    EMPTY_PROMPTS,
    FITS,
    LEAST_SIDE,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_PICTURES,
    MAX_POOLING,
    MAX_SIDE,
    MAX_STEPS,
    MAX_WEIGHT,
    MIN_GUIDANCE,
    QUALITIES,
    GenerationRequest,
    PreprocessedPicture,
)
from redux_pipelines.errors import RequestError

MAX_SEED = 2**63 - 1
_PICTURES = (Image.Image, PreprocessedPicture)


def check_request(request: GenerationRequest) -> None:
    """Raise ``RequestError`` naming the first field that cannot be served and what it may be."""
    if not isinstance(request.image, _PICTURES):
        raise RequestError(f"image is {_given(request.image)}: it must be a PIL image")
    if not isinstance(request.prompt, str):
        raise RequestError(f"prompt is {_given(request.prompt)}: it must be a string")
    _check_integer("width", request.width, LEAST_SIDE, MAX_SIDE)
    _check_integer("height", request.height, LEAST_SIDE, MAX_SIDE)
    _check_integer("num_inference_steps", request.num_inference_steps, 1, MAX_STEPS)
    _check_integer("num_images", request.num_images, 1, MAX_IMAGES)
    _check_integer("seed", request.seed, 0, MAX_SEED - MAX_IMAGES)
    _check_integer("redux_pooling", request.redux_pooling, 1, MAX_POOLING)
    _check_number("guidance_scale", request.guidance_scale, MIN_GUIDANCE, MAX_GUIDANCE)
    _check_number("redux_strength", request.redux_strength, 0, MAX_WEIGHT)
    _check_one_of("empty_prompt", request.empty_prompt, EMPTY_PROMPTS)
    _check_one_of("fit", request.fit, FITS)
    if request.quality is not None:
        _check_one_of("quality", request.quality, QUALITIES)
    _check_pictures(request)


def _check_pictures(request: GenerationRequest) -> None:
    for picture in request.images:
        if not isinstance(picture, _PICTURES):
            raise RequestError(f"images hold {_given(picture)}: they must be PIL images")
    count, weights = len(request.pictures), request.image_weights
    if count > MAX_PICTURES:
        raise RequestError(
            f"image and images are {count} pictures: they must be at most {MAX_PICTURES}"
        )
    if weights and len(weights) != count:
        raise RequestError(
            f"image_weights are {len(weights)} numbers for {count} picture(s): give one for each, "
            "that of image first, or none"
        )
    for weight in weights:
        _check_number("image_weights", weight, 0, MAX_WEIGHT)
    if request.mask is not None and not isinstance(request.mask, Image.Image):
        raise RequestError(f"mask is {_given(request.mask)}: it must be a PIL image or None")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is {_given(value)}: it must be an integer from {low} to {high}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not low <= number <= high:  # NaN is not
        raise RequestError(
            f"{name} is {_given(value)}: it must be a number from {low:g} to {high:g}"
        )


def _check_one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        words = ", ".join(map(repr, allowed))
        raise RequestError(f"{name} is {_given(value)}: it must be one of {words}")


def _given(value: object) -> str:
    return repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
