"""The parameters of a request: their names, defaults, ranges, and the words of their errors.

Those of the hosted endpoints come from their documentation, descriptions included.
``Extensions`` are those they do not have, in the words of ``redux_pipelines.contract.types``:
nobody who leaves them out notices them. The names of the model are in one file, since they differ
in few fields. Knows neither HTTP nor storage.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from redux_pipelines.contract.batching import has_text, is_solitary, weights_of
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
    OUTPUT_FORMATS,
    QUALITIES,
    EmptyPrompt,
    Fit,
    OutputFormat,
    Quality,
)
from redux_server.coercion import meant

MIN_SIDE = 512
MIN_SIDE_OF_ALIASES = LEAST_SIDE
DEFAULT_SIDE = 1024
MAX_SEED = 9_999_999_999
MAX_SEED_OF_ALIASES = 2**31 - 1
MAX_GUIDANCE_OF_PRO = 5.0
MAX_PROMPT = 10_000
MAX_URL = 8192
"""Of a picture or a webhook; nothing looks into a longer one."""
MODELS: Final = (
    "wavespeed-ai/flux-pro-redux",
    "wavespeed-ai/flux-redux-pro",
    "wavespeed-ai/flux-redux-dev",
)
_UI = "x-ui-component"  # the widget that the hosted service's own forms have for a parameter
_NOT_WANTED = {"enable_sync_mode", "width", "height"}  # sides are in the size
_SIZE = re.compile(r"(\d{1,9})\s*[*x×]\s*(\d{1,9})", re.IGNORECASE)
_EXAMPLE_IMAGE = (
    "https://d2g64w682n9w0w.cloudfront.net/media/images/1745413935078739480_xIVRNKGD.png"
)
# Neither a URL nor base64: no picture, whatever is in it.
_FILE_NAME = re.compile(r"(?![a-z]{2,}:)[^\n]*\.[A-Za-z]{3,4}", re.IGNORECASE)


def _one_of(names: tuple[str, ...]) -> str:
    return "one of " + ", ".join(f'"{name}"' for name in names)


def _size_words(least: int) -> str:
    return f'"WIDTH*HEIGHT", each from {least} to {MAX_SIDE}, such as "1024*1024"'


def _seed_words(most: int) -> str:
    return f"an integer from -1 (random) to {most}"


IMAGE_FORMS: Final = "an http(s) URL, a data URI (data:image/png;base64,...) or base64 of a picture"
ALLOWED: Final = {
    "image": IMAGE_FORMS,
    "prompt": f"a text of at most {MAX_PROMPT} characters",
    "size": _size_words(MIN_SIDE),
    "seed": _seed_words(MAX_SEED),
    "num_inference_steps": f"an integer from 1 to {MAX_STEPS}",
    "guidance_scale": f"a number from {MIN_GUIDANCE:g} to {MAX_GUIDANCE:g}",
    "num_images": f"an integer from 1 to {MAX_IMAGES}",
    "enable_safety_checker": "true or false",
    "enable_sync_mode": "true or false",
    "enable_base64_output": "true or false",
    "webhook_url": "an https URL",
    "webhook": "an https URL",
    "quality": _one_of(QUALITIES),
    "images": f"an array of pictures, at most {MAX_PICTURES} with that of image, "
    f"each {IMAGE_FORMS}",
    "image_weights": f"an array of numbers from 0 to {MAX_WEIGHT:g}, one for each picture: that of "
    "image first, then those of images",
    "redux_strength": f"a number from 0 to {MAX_WEIGHT:g}",
    "redux_pooling": f"an integer from 1 to {MAX_POOLING}",
    "fit": _one_of(FITS),
    "mask": IMAGE_FORMS,
    "empty_prompt": _one_of(EMPTY_PROMPTS),
    "output_format": _one_of(OUTPUT_FORMATS),
    "enable_preview": "true or false",
}
"""What each parameter takes, in the words of an error message."""


def parse_size(text: str, least: int = MIN_SIDE) -> tuple[int, int]:
    """Width and height in pixels of ``"1024*768"`` (``x`` is understood too).

    Raises:
        ValueError: not of that form, or a side of less than ``least`` or more than ``MAX_SIDE``.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("not a size")
    width, height = int(match[1]), int(match[2])
    if not all(least <= side <= MAX_SIDE for side in (width, height)):
        raise ValueError("out of range")
    return width, height


def _checked_size(least: int) -> Callable[[str], str]:
    def check(text: str) -> str:
        width, height = parse_size(text, least)
        return f"{width}*{height}"

    return check


def _whole(value: Any) -> Any:
    """Let 28.0 pass as 28 (JavaScript and JSON know one kind of number); never true as 1."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Whole = Annotated[int, BeforeValidator(_whole)]


# Fields that the names of the model have with limits of their own; forms read those of a size, too.
def _size_field(least: int) -> Any:
    return Field(
        f"{DEFAULT_SIDE}*{DEFAULT_SIDE}",
        description=f"The size of the generated image, {least} ~ {MAX_SIDE} per dimension.",
        examples=["1024*1024"],
        json_schema_extra={"minimum": least, "maximum": MAX_SIDE},
    )


def _side_field(name: str) -> Any:
    return Field(
        None,
        ge=MIN_SIDE_OF_ALIASES,
        le=MAX_SIDE,
        description=f"The {name} of the generated image in pixels, {DEFAULT_SIDE} if left out; "
        "size goes before it.",
        json_schema_extra={_UI: "slider"},
    )


def _seed_field(most: int) -> Any:
    return Field(
        -1,
        ge=-1,
        le=most,
        description="The same seed and the same prompt given to the same version of the model "
        "will output the same image every time. -1 (or none) picks one and reports it.",
    )


def _guidance_field(most: float) -> Any:
    return Field(
        3.5,
        ge=MIN_GUIDANCE,
        le=most,
        description="How close the model is to stick to the prompt (FLUX's distilled guidance).",
        json_schema_extra={_UI: "slider", "step": 0.1},
    )


Picture = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(ge=0, le=MAX_WEIGHT)]


class Extensions(BaseModel):
    """Beside the parameters of the hosted endpoint, after which the schema lists them."""

    hosted_order: ClassVar[tuple[str, ...]] = ()

    images: list[Picture] = Field(
        [],
        max_length=MAX_PICTURES - 1,
        description="More pictures to vary at the same time, each given like image. Without image "
        "the first of them takes its place; one that is image again, at their head, counts once.",
        json_schema_extra={_UI: "uploaders", "x-accept": "image/*"},
    )
    image_weights: list[Weight] = Field(
        [],
        max_length=MAX_PICTURES,
        description="How much each picture counts: one number per picture, that of image first. "
        "Left out, each counts 1; 0 leaves a picture out.",
    )
    redux_strength: float = Field(
        1.0,
        ge=0,
        le=MAX_WEIGHT,
        description="How much the pictures count against the prompt: 1 is Redux as it is, 2 the "
        "same pictures twice, 0 leaves them out.",
        json_schema_extra={_UI: "slider", "step": 0.05},
    )
    redux_pooling: Whole = Field(
        MAX_POOLING,
        ge=1,
        le=MAX_POOLING,
        description=f"How finely the pictures are seen: their {MAX_POOLING} x {MAX_POOLING} tokens "
        "are averaged to so many a side. Fewer keep less of the layout and leave more to the "
        "prompt.",
        json_schema_extra={_UI: "slider"},
    )
    fit: Fit = Field(
        "squash",
        description="How pictures that are no squares become the square that Redux sees: squash "
        "distorts them, letterbox keeps them whole, center cuts out the middle.",
        json_schema_extra={_UI: "select"},
    )
    mask: Picture | None = Field(
        None,
        description="Which part of image counts: a picture, given like image and stretched over "
        "it, that is white there and black elsewhere.",
        json_schema_extra={_UI: "uploader", "x-accept": "image/*"},
    )
    empty_prompt: EmptyPrompt = Field(
        "zeros",
        description="What an empty prompt is: no text at all (zeros), or the empty text (encode).",
        json_schema_extra={_UI: "select"},
    )
    output_format: OutputFormat = Field(
        "png",
        description="The kind of file of the generated images.",
        json_schema_extra={_UI: "select"},
    )

    enable_preview: bool = Field(
        False,
        description="If set to true, the task's stream also tells of small previews of the images "
        "while they form.",
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
        """The schema in the hosted order, our own parameters last: forms are built from it."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        properties = schema["properties"]
        first = cls.hosted_order
        own = [name for name in Extensions.model_fields if name not in first]
        others = [name for name in properties if name not in (*first, *own)]
        schema["properties"] = {name: properties[name] for name in (*first, *others, *own)}
        return schema

    def steering(self) -> dict[str, Any]:
        """What was asked for, pictures aside: no more than differs from the defaults."""
        return {
            name: getattr(self, name)
            for name, field in Extensions.model_fields.items()
            if name not in ("images", "mask") and getattr(self, name) != field.default
        }


class PredictionRequest(Extensions):
    """Parameters of one task. Unknown fields are ignored; null means absent.

    ``allowed`` are the words of errors, ``hosted_order`` the names that the hosted service has
    first, in its order.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    allowed: ClassVar[Mapping[str, str]] = ALLOWED

    image: str = Field(
        min_length=1,
        description="The URL of the image to generate an image from. A data URI or plain base64 "
        "is taken too. The picture is fetched after the task is accepted.",
        examples=[_EXAMPLE_IMAGE],
        json_schema_extra={_UI: "uploader", "x-accept": "image/*"},
    )
    prompt: str = Field(
        "",
        max_length=MAX_PROMPT,
        description="The prompt to generate an image from.",
        json_schema_extra={_UI: "textarea"},
    )
    size: Annotated[str, AfterValidator(_checked_size(MIN_SIDE))] = _size_field(MIN_SIDE)
    seed: Whole = _seed_field(MAX_SEED)
    num_inference_steps: Whole = Field(
        28,
        ge=1,
        le=MAX_STEPS,
        description="The number of inference steps to perform.",
        json_schema_extra={_UI: "slider"},
    )
    guidance_scale: float = _guidance_field(MAX_GUIDANCE)
    num_images: Whole = Field(
        1,
        ge=1,
        le=MAX_IMAGES,
        description="The number of images to generate.",
        json_schema_extra={_UI: "slider"},
    )
    enable_safety_checker: bool = Field(
        True, description="If set to true, the safety checker will be enabled."
    )

    enable_sync_mode: bool = Field(
        False,
        description="If set to true, the answer comes when the task has ended, or after "
        "`--sync-timeout-s` as `processing` with the code 5004, to be polled.",
    )
    enable_base64_output: bool = Field(
        False,
        description="If set to true, outputs are the images as base64 instead of their URLs. Not "
        "possible with a webhook.",
    )
    quality: Quality | None = Field(
        None,
        description="An extension of this server. exact computes every step; balanced and fast "
        "reuse work between steps. Left out, it is what the server was started with.",
        json_schema_extra={_UI: "select"},
    )

    webhook_url: str | None = Field(
        None,
        description="An https URL that is told when the task has ended, with the prediction "
        "object as its body. The query parameter webhook says the same.",
        examples=["https://example.com/hooks/redux"],
    )
    webhook: str | None = Field(None, description="Another name of webhook_url.")

    def parameters(self) -> dict[str, Any]:
        """What the answer depends on, but pictures; with a seed, extras only if asked for."""
        values = self.model_dump(
            exclude={
                *("image", "webhook", "webhook_url", "enable_sync_mode", "width", "height"),
                *Extensions.model_fields,
            }
            | ({"quality"} if self.quality is None else set())
            | (set() if self.enable_base64_output else {"enable_base64_output"})
        )
        if self.seed == -1:
            values["seed"] = secrets.randbelow(2**31)
        return values | self.steering()

    @property
    def shape(self) -> str:
        """What has to be equal for tasks to be denoised together; see ``batching.BatchKey``.

        Empty for a task that shares a batch with none.
        """
        if is_solitary(self):
            return ""
        text = "prompt" if has_text(self) else ""
        shape = f"{self.size}/{self.num_inference_steps}/{self.quality or ''}/{text}"
        counting = (weights_of(self), self.redux_pooling)
        if counting == ((1.0,), MAX_POOLING):
            return shape
        return f"{shape}/{hashlib.sha256(repr(counting).encode()).hexdigest()[:16]}"

    def digest(self, *more: str) -> str:
        """SHA-256 of the request, before a seed is picked, and of what ``more`` makes the task.

        Defaults are left out: it stays the same when a later version has more parameters. Whether
        to wait is no part of what is wanted: who waited in vain may ask again without.
        """
        text = self.model_dump_json(exclude_defaults=True, exclude=_NOT_WANTED)
        return hashlib.sha256(json.dumps([text, *more]).encode()).hexdigest()


class FluxReduxPro(PredictionRequest):
    """Parameters of ``flux-redux-pro``, as the hosted service has it."""

    hosted_order: ClassVar[tuple[str, ...]] = (
        *("image", "prompt", "size", "seed", "num_inference_steps", "guidance_scale"),
    )
    allowed: ClassVar[Mapping[str, str]] = ALLOWED | {
        "size": _size_words(MIN_SIDE_OF_ALIASES),
        "seed": _seed_words(MAX_SEED_OF_ALIASES),
        "guidance_scale": f"a number from {MIN_GUIDANCE:g} to {MAX_GUIDANCE_OF_PRO:g}",
    }

    size: Annotated[str, AfterValidator(_checked_size(MIN_SIDE_OF_ALIASES))] = _size_field(
        MIN_SIDE_OF_ALIASES
    )
    seed: Whole = _seed_field(MAX_SEED_OF_ALIASES)
    guidance_scale: float = _guidance_field(MAX_GUIDANCE_OF_PRO)


class FluxReduxDev(PredictionRequest):
    """Parameters of ``flux-redux-dev``, as the hosted service has it.

    Its sides may be given one by one; ``size`` goes before them.
    """

    hosted_order: ClassVar[tuple[str, ...]] = (
        *("image", "size", "width", "height", "num_inference_steps", "guidance_scale"),
        *("num_images", "seed", "output_format", "enable_base64_output", "enable_sync_mode"),
    )
    allowed: ClassVar[Mapping[str, str]] = ALLOWED | {
        "size": _size_words(MIN_SIDE_OF_ALIASES),
        "seed": _seed_words(MAX_SEED_OF_ALIASES),
        **dict.fromkeys(
            ("width", "height"), f"an integer from {MIN_SIDE_OF_ALIASES} to {MAX_SIDE}"
        ),
    }

    size: Annotated[str, AfterValidator(_checked_size(MIN_SIDE_OF_ALIASES))] = _size_field(
        MIN_SIDE_OF_ALIASES
    )
    width: Whole | None = _side_field("width")
    height: Whole | None = _side_field("height")
    seed: Whole = _seed_field(MAX_SEED_OF_ALIASES)
    output_format: OutputFormat = Field(
        "jpeg",
        description="The kind of file of the generated images.",
        json_schema_extra={_UI: "select"},
    )

    @model_validator(mode="after")
    def _size_of_sides(self) -> Self:
        if "size" not in self.model_fields_set and (self.width or self.height):
            self.size = f"{self.width or DEFAULT_SIDE}*{self.height or DEFAULT_SIDE}"
        return self


_REQUESTS: Final[dict[str, type[PredictionRequest]]] = {
    MODELS[0]: PredictionRequest,
    MODELS[1]: FluxReduxPro,
    MODELS[2]: FluxReduxDev,
}


def requests_of(model: str) -> type[PredictionRequest]:
    """What a request to ``model``, one of ``MODELS``, may say."""
    return _REQUESTS[model]


def parse_request(
    body: Any, model: str = MODELS[0], *, is_for_us: bool = False
) -> PredictionRequest:
    """Validate a decoded JSON body that was sent to ``model``.

    One that ``is_for_us``, written by our own client, means nothing but what it says.

    Raises:
        pydantic.ValidationError: see ``complaint`` for its text.
    """
    if isinstance(body, dict):
        given = {name: each for name, each in body.items() if each is not None}
        body = _with_first_image(given if is_for_us else meant(given))
    return requests_of(model).model_validate(body)


def _with_first_image(body: dict[str, Any]) -> dict[str, Any]:
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


def complaint(errors: Sequence[Any], allowed: Mapping[str, str] = ALLOWED) -> str:
    """One sentence per wrong parameter: its name, what is allowed, what was given."""
    return " ".join(_complain(error, allowed) for error in errors)


def _complain(error: Any, allowed: Mapping[str, str]) -> str:
    if not error["loc"]:
        return f"The body must be a JSON object, got {_shown(error['input'])}."
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{name} is required: {allowed[name]}."
    return f"{name} must be {allowed[name]}; got {_shown(error['input'])}."


def _shown(value: Any) -> str:
    """A caller's value in JSON's words and in ASCII: it may be nested or no valid Unicode."""
    if isinstance(value, list | dict):
        return f"an array of {len(value)}" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
