"""Which requests a pipeline serves: one check that every pipeline, real or fake, applies.

Imports no torch. Limits live in ``redux_pipelines.types``.
"""

import math

from PIL import Image

from redux_pipelines.errors import RequestError
from redux_pipelines.types import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SIDE,
    MAX_STEPS,
    MIN_GUIDANCE,
    MIN_SIDE,
    QUALITIES,
    GenerationRequest,
)

MAX_SEED = 2**63 - 1
_EMPTY_PROMPTS = ("zeros", "encode")


def check_request(request: GenerationRequest) -> None:
    """Raise ``RequestError`` naming the first field that cannot be served and what it may be."""
    if not isinstance(request.image, Image.Image):
        raise RequestError(f"image is {_given(request.image)}: it must be a PIL image")
    if not isinstance(request.prompt, str):
        raise RequestError(f"prompt is {_given(request.prompt)}: it must be a string")
    _check_integer("width", request.width, MIN_SIDE, MAX_SIDE)
    _check_integer("height", request.height, MIN_SIDE, MAX_SIDE)
    _check_integer("num_inference_steps", request.num_inference_steps, 1, MAX_STEPS)
    _check_integer("num_images", request.num_images, 1, MAX_IMAGES)
    _check_integer("seed", request.seed, 0, MAX_SEED - MAX_IMAGES)
    _check_guidance(request.guidance_scale)
    if request.empty_prompt not in _EMPTY_PROMPTS:
        allowed = " or ".join(map(repr, _EMPTY_PROMPTS))
        raise RequestError(f"empty_prompt is {_given(request.empty_prompt)}: it must be {allowed}")
    if request.quality not in (None, *QUALITIES):
        allowed = ", ".join(map(repr, QUALITIES))
        raise RequestError(f"quality is {_given(request.quality)}: it must be one of {allowed}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is {_given(value)}: it must be an integer from {low} to {high}")


def _check_guidance(value: object) -> None:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not MIN_GUIDANCE <= number <= MAX_GUIDANCE:  # NaN is not
        raise RequestError(
            f"guidance_scale is {_given(value)}: it must be a number "
            f"from {MIN_GUIDANCE:g} to {MAX_GUIDANCE:g}"
        )


def _given(value: object) -> str:
    return repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
