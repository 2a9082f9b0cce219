"""How far the requests of a batch are: their images, steps done, times and ends.

Every pipeline keeps this account, real or fake. Imports no torch; knows no network.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image

from redux_pipelines.contract.types import (
    BatchEvent,
    GenerationRequest,
    Preview,
    Progress,
    Quality,
    Result,
)
from redux_pipelines.errors import ReduxError
from redux_pipelines.images.rgb import centre_crop


class Row(NamedTuple):
    """One image of a batch: the index of its request, and its own seed."""

    request: int
    seed: int


def rows_of(requests: Sequence[GenerationRequest]) -> list[Row]:
    """All images of ``requests``, in their order; image *i* of a request has its seed + i."""
    return [
        Row(index, request.seed + image)
        for index, request in enumerate(requests)
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
    _steps_reported: int = 0

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

    def progress(
        self, steps: int, images: int, look: Callable[[], Image.Image] | None = None
    ) -> Progress:
        """``steps`` steps of the next ``images`` images are done. Never less than was reported.

        ``look`` makes a small picture of the first of them.
        """
        self._steps_reported = max(self._steps_reported, self._steps_done + steps * images)
        index = len(self.images)
        preview = None if look is None else lambda: Preview(look(), index)
        return Progress(self._steps_reported, self.total_steps, preview)

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
