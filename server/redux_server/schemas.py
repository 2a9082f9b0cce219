"""The shapes of the wire: the request's parameters, and the prediction object clients read.

Parameter names, defaults, ranges and descriptions are those of the hosted service's documentation.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from pydantic import AfterValidator, ConfigDict, Field

from redux_pipelines.batching import has_text, is_solitary, weights_of
from redux_pipelines.types import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_POOLING,
    MAX_SIDE,
    MAX_STEPS,
    MIN_GUIDANCE,
    MIN_SIDE,
    QUALITIES,
    Quality,
)
from redux_server.extensions import (
    ALLOWED as EXTENSIONS_ALLOWED,
)
from redux_server.extensions import IMAGE_FORMS, Extensions, Whole, one_of, with_first_image
from redux_server.tasks import Outcome, Status, Task

MAX_SEED = 9_999_999_999
MAX_PROMPT = 10_000
MODELS: Final = (
    "wavespeed-ai/flux-pro-redux",
    "wavespeed-ai/flux-redux-pro",
    "wavespeed-ai/flux-redux-dev",
)

_SIZE = re.compile(r"(\d{1,9})\s*[*x×]\s*(\d{1,9})", re.IGNORECASE)
_EXAMPLE_IMAGE = (
    "https://d2g64w682n9w0w.cloudfront.net/media/images/1745413935078739480_xIVRNKGD.png"
)

# What each parameter takes, in the words of an error message.
ALLOWED: Final = {
    "image": IMAGE_FORMS,
    "prompt": f"a text of at most {MAX_PROMPT} characters",
    "size": f'"WIDTH*HEIGHT", each from {MIN_SIDE} to {MAX_SIDE}, such as "1024*1024"',
    "seed": f"an integer from -1 (random) to {MAX_SEED}",
    "num_inference_steps": f"an integer from 1 to {MAX_STEPS}",
    "guidance_scale": f"a number from {MIN_GUIDANCE:g} to {MAX_GUIDANCE:g}",
    "num_images": f"an integer from 1 to {MAX_IMAGES}",
    "enable_safety_checker": "true or false",
    "enable_sync_mode": "true or false",
    "enable_base64_output": "true or false",
    "webhook_url": "an https URL",
    "webhook": "an https URL",
    "quality": one_of(QUALITIES),
    **EXTENSIONS_ALLOWED,
}


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels of ``"1024*768"`` (``x`` is understood too).

    Raises:
        ValueError: not of that form, or a side out of range.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("not a size")
    width, height = int(match[1]), int(match[2])
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in (width, height)):
        raise ValueError("out of range")
    return width, height


def _check_size(text: str) -> str:
    width, height = parse_size(text)
    return f"{width}*{height}"


class PredictionRequest(Extensions):
    """Parameters of one task. Unknown fields are ignored; null means absent."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    image: str = Field(
        min_length=1,
        description="The URL of the image to generate an image from. A data URI or plain base64 "
        "is taken too. The picture is fetched after the task is accepted.",
        examples=[_EXAMPLE_IMAGE],
    )
    prompt: str = Field(
        "", max_length=MAX_PROMPT, description="The prompt to generate an image from."
    )
    size: Annotated[str, AfterValidator(_check_size)] = Field(
        "1024*1024",
        description=f"The size of the generated image, {MIN_SIDE} ~ {MAX_SIDE} per dimension.",
        examples=["1024*1024"],
    )
    seed: Whole = Field(
        -1,
        ge=-1,
        le=MAX_SEED,
        description="The same seed and the same prompt given to the same version of the model "
        "will output the same image every time. -1 (or none) picks one and reports it.",
    )
    num_inference_steps: Whole = Field(
        28, ge=1, le=MAX_STEPS, description="The number of inference steps to perform."
    )
    guidance_scale: float = Field(
        3.5,
        ge=MIN_GUIDANCE,
        le=MAX_GUIDANCE,
        description="How close the model is to stick to the prompt (FLUX's distilled guidance).",
    )
    num_images: Whole = Field(
        1, ge=1, le=MAX_IMAGES, description="The number of images to generate."
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
                *("image", "webhook", "webhook_url", "enable_sync_mode"),
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
        """What has to be equal for tasks to be denoised together: see ``batching.BatchKey``.

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
        text = self.model_dump_json(exclude_defaults=True, exclude={"enable_sync_mode"})
        return hashlib.sha256(json.dumps([text, *more]).encode()).hexdigest()


def parse_request(body: Any) -> PredictionRequest:
    """Validate a decoded JSON body.

    Raises:
        pydantic.ValidationError: see ``complaint`` for its text.
    """
    if isinstance(body, dict):
        body = with_first_image({name: each for name, each in body.items() if each is not None})
    return PredictionRequest.model_validate(body)


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


def prediction(task: Task, *, base_url: str, sign: Callable[[str, float], str]) -> dict[str, Any]:
    """The ``data`` object that satisfies all known clients at once (wire contract, section 2).

    ``sign`` turns a blob key and the time the task ended into a path; ``base_url`` has no
    trailing slash.
    """
    outcome = task.outcome or Outcome(status=task.status)
    ended = task.finished_at or 0.0
    return {
        "id": task.id,
        "model": task.model,
        "input": public_input(task),
        "outputs": [base_url + sign(key, ended) for key in outcome.outputs],
        "urls": {"get": f"{base_url}/api/v3/predictions/{task.id}/result"},
        "has_nsfw_contents": outcome.has_nsfw_contents,
        "seeds": outcome.seeds,
        "quality": outcome.quality,
        "reused_steps": outcome.reused_steps,
        "status": task.status.value,
        "progress": _progress(task),
        "created_at": timestamp(task.created_at),
        "error": outcome.error,
        "code": outcome.code,
        "executionTime": outcome.timings.get("inference", 0),
        "timings": {"inference": 0, **outcome.timings},
    }


def public_input(task: Task) -> dict[str, Any]:
    """The task's parameters; pictures that were sent inline are left out."""
    shown = dict(task.input)
    for name in ("image", "mask"):
        if _is_inline(shown.get(name, "")):
            del shown[name]
    if "images" in shown:
        shown["images"] = [each for each in shown["images"] if not _is_inline(each)]
    return shown


def _is_inline(picture: str) -> bool:
    return picture.startswith("blob:")


def _progress(task: Task) -> dict[str, int]:
    total = task.input["num_inference_steps"] * task.input["num_images"]
    step = total if task.status is Status.COMPLETED else task.progress_step
    return {"step": step, "total_steps": total}


def timestamp(unix_s: float) -> str:
    """RFC 3339 in UTC with milliseconds and a Z."""
    moment = datetime.fromtimestamp(unix_s, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def envelope(data: Any) -> dict[str, Any]:
    """What every answer with status 200 looks like."""
    return {"code": 200, "message": "success", "data": data}
