"""Parameters that the hosted endpoint does not have: what users of Redux ask for beside it.

Nobody who leaves them out notices them. Their words are those of ``redux_pipelines.types``. Knows
nothing of the other parameters but that ``image`` is the first picture.
"""

import re
from typing import Annotated, Any, Final

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema

from redux_pipelines.types import (
    EMPTY_PROMPTS,
    FITS,
    MAX_PICTURES,
    MAX_POOLING,
    MAX_WEIGHT,
    OUTPUT_FORMATS,
    EmptyPrompt,
    Fit,
    OutputFormat,
)

IMAGE_FORMS: Final = "an http(s) URL, a data URI (data:image/png;base64,...) or base64 of a picture"


def one_of(names: tuple[str, ...]) -> str:
    """What a parameter with these values takes, in the words of an error message."""
    return "one of " + ", ".join(f'"{name}"' for name in names)


ALLOWED: Final = {
    "images": f"an array of pictures, at most {MAX_PICTURES} with that of image, "
    f"each {IMAGE_FORMS}",
    "image_weights": f"an array of numbers from 0 to {MAX_WEIGHT:g}, one for each picture: that of "
    "image first, then those of images",
    "redux_strength": f"a number from 0 to {MAX_WEIGHT:g}",
    "redux_pooling": f"an integer from 1 to {MAX_POOLING}",
    "fit": one_of(FITS),
    "mask": IMAGE_FORMS,
    "empty_prompt": one_of(EMPTY_PROMPTS),
    "output_format": one_of(OUTPUT_FORMATS),
}


def _whole(value: Any) -> Any:
    """Let 28.0 pass as 28 (JavaScript and JSON know one kind of number); never true as 1."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# Neither a URL nor base64: no picture, whatever is in it.
_FILE_NAME = re.compile(r"(?![a-z]{2,}:)[^\n]*\.[A-Za-z]{3,4}", re.IGNORECASE)

Whole = Annotated[int, BeforeValidator(_whole)]
Picture = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(ge=0, le=MAX_WEIGHT)]


class Extensions(BaseModel):
    """Beside the parameters of the hosted endpoint, after which the schema lists them."""

    images: list[Picture] = Field(
        [],
        max_length=MAX_PICTURES - 1,
        description="More pictures to vary at the same time, each given like image. Without image "
        "the first of them takes its place; one that is image again, at their head, counts once.",
    )
    image_weights: list[Weight] = Field(
        [],
        max_length=MAX_PICTURES,
        description="How much each picture counts: one number per picture, that of image first. "
        "Left out, each counts 1; 0 leaves a picture out.",
        examples=[[1.0, 0.5]],
    )
    redux_strength: float = Field(
        1.0,
        ge=0,
        le=MAX_WEIGHT,
        description="How much the pictures count against the prompt: 1 is Redux as it is, 2 the "
        "same pictures twice, 0 leaves them out.",
    )
    redux_pooling: Whole = Field(
        MAX_POOLING,
        ge=1,
        le=MAX_POOLING,
        description=f"How finely the pictures are seen: their {MAX_POOLING} x {MAX_POOLING} tokens "
        "are averaged to so many a side. Fewer keep less of the layout and leave more to the "
        "prompt.",
    )
    fit: Fit = Field(
        "squash",
        description="How pictures that are no squares become the square that Redux sees: squash "
        "distorts them, letterbox keeps them whole, center cuts out the middle.",
    )
    mask: Picture | None = Field(
        None,
        description="Which part of image counts: a picture, given like image and stretched over "
        "it, that is white there and black elsewhere.",
    )
    empty_prompt: EmptyPrompt = Field(
        "zeros",
        description="What an empty prompt is: no text at all (zeros), or the empty text (encode).",
    )
    output_format: OutputFormat = Field(
        "png", description="The kind of file of the generated images."
    )

    @field_validator("image_weights")
    @classmethod
    def _one_for_each_picture(cls, weights: list[float], info: ValidationInfo) -> list[float]:
        images = info.data.get("images")  # not there if they are wrong themselves
        if weights and images is not None and len(weights) != 1 + len(images):
            raise ValueError("as many as pictures")
        return weights

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The schema with these parameters after all others: forms are built from it."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        properties = schema["properties"]
        for name in Extensions.model_fields:
            properties[name] = properties.pop(name)
        return schema

    def steering(self) -> dict[str, Any]:
        """What was asked for, pictures aside: no more than differs from the defaults."""
        return {
            name: getattr(self, name)
            for name, field in Extensions.model_fields.items()
            if name not in ("images", "mask") and getattr(self, name) != field.default
        }


def with_first_image(body: dict[str, Any]) -> dict[str, Any]:
    """``body``, the first of its ``images`` in the place of an ``image`` that is not there.

    Where it is there and they begin with it too, it counts once: so do clients that send both.
    """
    images = body.get("images")
    if not isinstance(images, list) or not images:
        return body
    image = body.get("image", images[0])
    rest = images[1:] if _is_again(images[0], image) else images
    return {**body, "image": image, "images": rest}


def _is_again(first: Any, image: Any) -> bool:
    """Whether ``first`` stands for ``image``.

    wavespeed-mcp 0.1.27 leaves there what it was told by its user, be it base64 or the name of a
    local file, and sends in ``image`` what it made of that.
    """
    if not isinstance(first, str) or not isinstance(image, str):
        return first is image
    return first == image or image.endswith(f",{first}") or bool(_FILE_NAME.fullmatch(first))
