"""A pipeline without a model, for tests and benchmarks of what stands around one.

Imports no torch. Keeps the whole contract: validation, batches, progress, sizes, seeds and
determinism.
"""

import hashlib
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial

from PIL import Image

from redux_pipelines.contract.batching import check_together, weights_of
from redux_pipelines.contract.types import (
    MAX_POOLING,
    BatchEvent,
    CacheStats,
    CompilePlan,
    CompileReport,
    GenerationRequest,
    ModelInfo,
    PreprocessedPicture,
    Progress,
    Quality,
    Result,
)
from redux_pipelines.contract.validation import check_request
from redux_pipelines.errors import OutputError
from redux_pipelines.images.rgb import grey, to_rgb
from redux_pipelines.jobs import Job, Row, images_per_request, only, rows_of

SLOW_STEP_S = 0.02
"""What a step of the model ``fake-slow`` takes, for as many images as it denoises together."""
SPOILED = "[spoiled]"
"""A prompt with this makes what a real model makes when its numbers overflow: no picture."""


class FakePipeline:
    """Plain-coloured pictures; the colour depends on all but size and steps.

    Of a picture the mean colour is what counts, where a mask is white.

    Each step sleeps ``step_s`` seconds. A request whose prompt contains ``fail_on`` raises
    ``RuntimeError`` after its first step; one with ``SPOILED`` in it ends with ``OutputError``, at
    the point where the real pipeline finds numbers that are not finite. A ``quality`` is reported
    and changes nothing.
    """

    def __init__(
        self,
        *,
        step_s: float = 0.0,
        fail_on: str | None = None,
        quality: Quality = "exact",
        max_batch_size: int = 1,
    ) -> None:
        self._quality = quality
        self._step_s = step_s
        self._fail_on = fail_on
        self._max_batch_size = max_batch_size

    @property
    def info(self) -> ModelInfo:
        """A model called ``fake``."""
        return ModelInfo(name="fake", backend="fake", device="cpu", dtype="uint8", size_multiple=1)

    def cache_stats(self) -> dict[str, CacheStats]:
        """It keeps nothing."""
        return {}

    def compile(self, plan: CompilePlan) -> CompileReport:
        """It has nothing to compile."""
        return CompileReport("off", 0, ("the fake model has nothing to compile",), {})

    def preprocess(self, request: GenerationRequest) -> GenerationRequest:
        """The request with the mean colours of its pictures, which are all that is looked at."""
        check_request(request)
        return replace(
            request,
            image=_mean(request.image, request.mask),
            images=tuple(_mean(each) for each in request.images),
        )

    def generate(self, request: GenerationRequest) -> Generator[Progress | Result, None, None]:
        """Check the request at once; then yield a ``Progress`` per step and one ``Result``."""
        return only(self.generate_batch([request]))

    def generate_batch(
        self, requests: Sequence[GenerationRequest]
    ) -> Generator[BatchEvent, None, None]:
        """Check all at once; then yield as ``Pipeline`` says."""
        for request in requests:
            check_request(request)
        requests = [replace(each, quality=each.quality or self._quality) for each in requests]
        check_together(requests)
        return self._run(requests)

    def _run(self, requests: Sequence[GenerationRequest]) -> Generator[BatchEvent, None, None]:
        jobs = [Job(request, request.quality or self._quality) for request in requests]
        seen = []
        for job in jobs:
            with job.timed("encode_s"):
                seen.append(_seen(job.request))
        rows = rows_of(requests)
        for first in range(0, len(rows), self._max_batch_size):
            chunk = rows[first : first + self._max_batch_size]
            yield from self._denoise(jobs, chunk, seen)
            for row in chunk:
                job = jobs[row.request]
                with job.timed("decode_s"):
                    job.take(_picture(job.request, row.seed, seen[row.request]), reused=0)
            for index in images_per_request(chunk):
                if jobs[index].is_settled:
                    yield index, jobs[index].end()

    def _denoise(
        self, jobs: Sequence[Job], chunk: Sequence[Row], seen: Sequence[bytes]
    ) -> Generator[BatchEvent, None, None]:
        counts = images_per_request(chunk)
        for step in range(1, jobs[0].request.num_inference_steps + 1):
            begin = time.perf_counter()
            if self._step_s:
                time.sleep(self._step_s)
            for index in counts:
                jobs[index].spend("denoise_s", time.perf_counter() - begin)
            for index, images in counts.items():
                row = next(row for row in chunk if row.request == index)
                look = partial(_small, jobs[index].request, row.seed, seen[index])
                yield index, jobs[index].progress(step, images, look)
            for index in counts:
                self._fail_if_asked(jobs[index].request)

    def _fail_if_asked(self, request: GenerationRequest) -> None:
        if self._fail_on is not None and self._fail_on in request.prompt:
            raise RuntimeError(f"told to fail on prompts that contain {self._fail_on!r}")


def _seen(request: GenerationRequest) -> bytes:
    """What is looked at: the first picture's mean colour, and what else there is to know."""
    means = [_mean(request.image, request.mask), *(_mean(each) for each in request.images)]
    colours = [mean.pixels.tobytes() for mean in means]
    steered = weights_of(request), request.redux_pooling, request.fit
    if steered == ((1.0,), MAX_POOLING, "squash"):
        return colours[0]
    return b"".join(colours) + repr(steered).encode()


def _mean(
    picture: Image.Image | PreprocessedPicture, mask: Image.Image | None = None
) -> PreprocessedPicture:
    """One pixel: the mean colour of what ``mask`` leaves of a picture."""
    if isinstance(picture, PreprocessedPicture):
        return picture
    rgb = to_rgb(picture)
    if mask is not None:
        seen = Image.new("RGB", rgb.size)
        seen.paste(rgb, mask=grey(mask).resize(rgb.size))
        rgb = seen
    return PreprocessedPicture(rgb.resize((1, 1), Image.Resampling.BOX))


def _picture(request: GenerationRequest, seed: int, seen: bytes) -> Image.Image | OutputError:
    if SPOILED in request.prompt:
        return OutputError(f"told to make no picture of prompts that contain {SPOILED!r}")
    return _plain(request, seed, seen)


def _small(request: GenerationRequest, seed: int, seen: bytes) -> Image.Image:
    """A preview: its picture, an eighth as large."""
    return _plain(request, seed, seen).reduce(8)


def _plain(request: GenerationRequest, seed: int, seen: bytes) -> Image.Image:
    digest = hashlib.sha256(f"{seed}\0{request.prompt}\0".encode() + seen).digest()
    return Image.new("RGB", (request.width, request.height), (digest[0], digest[1], digest[2]))
