"""A pipeline without a model, for tests and benchmarks of what stands around one.

Imports no torch. Keeps the whole contract: validation, progress, sizes, seeds and determinism.
"""

import hashlib
import time
from collections.abc import Generator

from PIL import Image

from redux_pipelines.images import to_rgb
from redux_pipelines.types import (
    CacheStats,
    CompilePlan,
    CompileReport,
    GenerationRequest,
    ModelInfo,
    Progress,
    Quality,
    Result,
)
from redux_pipelines.validation import check_request

SLOW_STEP_S = 0.02
"""What a step of the model ``fake-slow`` takes."""


class FakePipeline:
    """Plain-coloured pictures; the colour depends on seed, prompt and the input's mean colour.

    Each step sleeps ``step_s`` seconds. A request whose prompt contains ``fail_on`` raises
    ``RuntimeError`` after its first step. A ``quality`` is reported and changes nothing.
    """

    def __init__(
        self, *, step_s: float = 0.0, fail_on: str | None = None, quality: Quality = "exact"
    ) -> None:
        self._quality = quality
        self._step_s = step_s
        self._fail_on = fail_on

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

    def generate(self, request: GenerationRequest) -> Generator[Progress | Result, None, None]:
        """Check the request at once; then yield a ``Progress`` per step and one ``Result``."""
        check_request(request)
        return self._run(request)

    def _run(self, request: GenerationRequest) -> Generator[Progress | Result, None, None]:
        begin = time.perf_counter()
        mean = to_rgb(request.image).resize((1, 1), Image.Resampling.BOX).tobytes()
        encoded = time.perf_counter()
        total = request.num_inference_steps * request.num_images
        for step in range(1, total + 1):
            if self._step_s:
                time.sleep(self._step_s)
            yield Progress(step, total)
            if self._fail_on is not None and self._fail_on in request.prompt:
                raise RuntimeError(f"told to fail on prompts that contain {self._fail_on!r}")
        denoised = time.perf_counter()
        seeds = tuple(request.seed + index for index in range(request.num_images))
        images = tuple(_plain(request, seed, mean) for seed in seeds)
        timings = {
            "encode_s": encoded - begin,
            "denoise_s": denoised - encoded,
            "decode_s": time.perf_counter() - denoised,
        }
        quality = request.quality or self._quality
        yield Result(images, seeds, timings, quality=quality, computed_steps=total)


def _plain(request: GenerationRequest, seed: int, mean: bytes) -> Image.Image:
    digest = hashlib.sha256(f"{seed}\0{request.prompt}\0".encode() + mean).digest()
    return Image.new("RGB", (request.width, request.height), (digest[0], digest[1], digest[2]))
