"""Which requests may be denoised together, and which image of a batch belongs to which of them.

Imports no torch: shared by every pipeline, real or fake, and by callers that sort requests.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from PIL import Image

from redux_pipelines.errors import ReduxError, RequestError
from redux_pipelines.images import centre_crop
from redux_pipelines.types import (
    BatchEvent,
    EmptyPrompt,
    Fit,
    GenerationRequest,
    Progress,
    Quality,
    Result,
)


class BatchKey(NamedTuple):
    """What requests of one batch have in common; all else may differ from one to the next.

    Sizes and steps make the schedule and the number of image tokens. The tier says when the step
    cache may reuse. A prompt that is encoded is 512 different tokens, none is one folded token: a
    batch holds one kind or the other, so that one layout of keys serves it and no row is padded.
    For the same reason all have as many pictures, which count as much, pooled alike.
    """

    width: int
    height: int
    num_inference_steps: int
    quality: Quality | None
    has_text: bool
    weights: tuple[float, ...]
    redux_pooling: int


class Steered(Protocol):
    """What a request says of how its pictures and prompt count, whatever stands for a picture."""

    @property
    def prompt(self) -> str:  # noqa: D102
        ...

    @property
    def empty_prompt(self) -> EmptyPrompt:  # noqa: D102
        ...

    @property
    def images(self) -> Sequence[object]:  # noqa: D102
        ...

    @property
    def image_weights(self) -> Sequence[float]:  # noqa: D102
        ...

    @property
    def redux_strength(self) -> float:  # noqa: D102
        ...

    @property
    def fit(self) -> Fit:  # noqa: D102
        ...

    @property
    def mask(self) -> object | None:  # noqa: D102
        ...


class Row(NamedTuple):
    """One image of a batch: the place of its request, and its own seed."""

    request: int
    seed: int


def has_text(request: Steered) -> bool:
    """Whether the prompt is encoded, instead of standing for zero embeddings."""
    return request.prompt != "" or request.empty_prompt == "encode"


def weights_of(request: Steered) -> tuple[float, ...]:
    """How much each picture counts, strength and all; what counts 0 is left out."""
    own = request.image_weights or (1.0,) * (1 + len(request.images))
    return tuple(request.redux_strength * weight for weight in own)


def is_solitary(request: Steered) -> bool:
    """Whether its pictures decide how many tokens they are: it shares a batch with nobody."""
    return request.mask is not None or request.fit == "letterbox"


def batch_key(request: GenerationRequest) -> BatchKey:
    """Requests of equal keys may be denoised together. A ``quality`` of None equals only None."""
    return BatchKey(
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        quality=request.quality,
        has_text=has_text(request),
        weights=weights_of(request),
        redux_pooling=request.redux_pooling,
    )


def check_together(requests: Sequence[GenerationRequest]) -> None:
    """Raise ``RequestError`` unless there are requests and all have one key, or there is one."""
    if not requests:
        raise RequestError("a batch of no requests was given: it must hold at least one")
    for place, request in enumerate(requests):
        if len(requests) > 1 and is_solitary(request):
            raise RequestError(
                f"request {place} cannot be denoised together with others: what a mask, or fit "
                "'letterbox', leaves of a picture is as many tokens as it happens to be"
            )
    first = batch_key(requests[0])
    for place, request in enumerate(requests):
        for name, one, other in zip(BatchKey._fields, first, batch_key(request), strict=True):
            if one != other:
                raise RequestError(
                    f"requests 0 and {place} cannot be denoised together: {name} is {one!r} and "
                    f"{other!r}, and must be the same within a batch"
                )


def rows_of(requests: Sequence[GenerationRequest]) -> list[Row]:
    """All images of ``requests``, in their order; image *i* of a request has its seed + i."""
    return [
        Row(place, request.seed + image)
        for place, request in enumerate(requests)
        for image in range(request.num_images)
    ]


def images_per_request(rows: Sequence[Row]) -> dict[int, int]:
    """How many of ``rows`` belong to which request, in their order."""
    counts: dict[int, int] = {}
    for row in rows:
        counts[row.request] = counts.get(row.request, 0) + 1
    return counts


def only(events: Iterator[BatchEvent]) -> Generator[Progress | Result, None, None]:
    """The events of a batch that holds one request; raises the error that spoiled it."""
    for _, event in events:
        if isinstance(event, ReduxError):
            raise event
        yield event


@dataclass(slots=True)
class Job:
    """How far a request of a batch is."""

    request: GenerationRequest
    quality: Quality
    images: list[Image.Image] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    error: ReduxError | None = None
    reused_steps: int = 0
    _steps_done: int = 0
    _steps_told: int = 0

    @property
    def total_steps(self) -> int:
        """Denoising steps of all its images."""
        return self.request.num_inference_steps * self.request.num_images

    @property
    def is_settled(self) -> bool:
        """Whether all its images are made, or one was spoiled."""
        return self.error is not None or len(self.images) == self.request.num_images

    def spend(self, stage: str, seconds: float) -> None:
        """Add to the time of a stage."""
        self.timings[stage] = self.timings.get(stage, 0.0) + seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of a block to that of a stage."""
        begin = time.perf_counter()
        yield
        self.spend(stage, time.perf_counter() - begin)

    def progress(self, steps: int, images: int) -> Progress:
        """``steps`` steps of the next ``images`` images are done. Never less than was told."""
        self._steps_told = max(self._steps_told, self._steps_done + steps * images)
        return Progress(self._steps_told, self.total_steps)

    def take(self, image: Image.Image | ReduxError, *, reused: int) -> None:
        """One image more, larger than asked for perhaps, or what spoiled it.

        ``reused`` of its steps reused an earlier one's work.
        """
        self._steps_done += self.request.num_inference_steps
        self.reused_steps += reused
        if isinstance(image, ReduxError):
            self.error = image
        else:
            self.images.append(centre_crop(image, self.request.width, self.request.height))

    def end(self) -> Result | ReduxError:
        """Its result, once it is settled."""
        if self.error is not None:
            return self.error
        seeds = tuple(row.seed for row in rows_of([self.request]))
        return Result(
            images=tuple(self.images),
            seeds=seeds,
            timings=self.timings,
            quality=self.quality,
            computed_steps=self.total_steps - self.reused_steps,
            reused_steps=self.reused_steps,
        )
