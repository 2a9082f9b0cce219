"""The pipeline: encode a picture and a prompt, denoise, decode, crop.

It steps diffusers' modules itself, as a generator, so that progress, cancelling and memory belong
to the caller. Knows neither where checkpoints come from nor which transformer backend runs.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from redux_pipelines import sampling
from redux_pipelines.autoencoder import Autoencoder
from redux_pipelines.denoiser import Denoiser, PreparedDenoiser, Run
from redux_pipelines.errors import RequestError
from redux_pipelines.image_encoder import ImageEncoder
from redux_pipelines.memory_plan import Plan
from redux_pipelines.quality import TIERS
from redux_pipelines.sampling import Grid, Scheduler
from redux_pipelines.text_encoders import TextEncoders
from redux_pipelines.tokens import Conditioning, Tokens
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
from redux_pipelines.warm_up import compiled_mode, warm_up


@dataclass(frozen=True, slots=True)
class Components:
    """The loaded parts of a checkpoint, for one device in one dtype.

    ``scheduler`` is a template that is copied, never stepped. ``plan`` says where the weights live.
    ``has_fp8``: large layers of the transformer are not in ``dtype``, but in fp8.
    """

    image_encoder: ImageEncoder
    text_encoders: TextEncoders
    denoiser: Denoiser
    autoencoder: Autoencoder
    scheduler: Scheduler
    device: torch.device
    dtype: torch.dtype
    plan: Plan
    has_fp8: bool = False

    @property
    def dtype_name(self) -> str:
        """For ``ModelInfo``: such as ``bfloat16``, or ``bfloat16 with fp8``."""
        return str(self.dtype).removeprefix("torch.") + (" with fp8" if self.has_fp8 else "")


class ReduxPipeline:
    """FLUX.1 + Redux: variations of a picture.

    With ``max_batch_size=1`` each image of a request is denoised on its own and is bitwise the
    same however many are asked for; larger batches agree to about one grey level in 255, unless the
    step cache of a ``quality`` below exact decides differently for them: a batch decides as one.
    """

    def __init__(
        self,
        components: Components,
        *,
        name: str,
        max_batch_size: int = 1,
        quality: Quality = "exact",
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size={max_batch_size} must be at least 1")
        _check_tier(components.denoiser, quality)
        self._parts = components
        self._quality = quality
        self._max_batch_size = max_batch_size
        self._info = ModelInfo(
            name=name,
            backend=components.denoiser.name,
            device=str(components.device),
            dtype=components.dtype_name,
            size_multiple=sampling.PATCH * components.autoencoder.factor,
            attention=components.denoiser.attention,
        )

    @property
    def info(self) -> ModelInfo:
        """What was loaded, and what of it runs compiled."""
        return replace(self._info, compiled=compiled_mode(self._parts.denoiser))

    def compile(self, plan: CompilePlan) -> CompileReport:
        """See ``Pipeline``. Raises ``ValueError`` for another backend than the engine."""
        sizes = tuple(
            sampling.grid_for(width, height, self._info.size_multiple)
            for width, height in plan.sizes
        )
        batches = (1,) if self._max_batch_size == 1 else (1, 2)
        return warm_up(self._parts.denoiser, plan, sizes, batches)

    def cache_stats(self) -> dict[str, CacheStats]:
        """Those of the prompts, of the pictures, and of what the denoiser keeps."""
        parts = self._parts
        stats = {name: cache.stats for name, cache in parts.denoiser.caches.items()}
        stats["prompts"] = parts.text_encoders.cache.stats
        stats["pictures"] = parts.image_encoder.cache.stats
        return stats

    def generate(self, request: GenerationRequest) -> Generator[Progress | Result, None, None]:
        """Check the request at once; then yield a ``Progress`` per step and one ``Result``.

        Nothing is computed before the first ``next``. Closing the generator frees all it holds.
        A step of a batch of images counts once for each. On a GPU the step last reported may
        still be running. Raises ``RequestError``.
        """
        check_request(request)
        quality = request.quality or self._quality
        _check_tier(self._parts.denoiser, quality)
        if _needs_text(request):
            self._parts.text_encoders.require()
        return self._run(request, quality)

    def _run(
        self, request: GenerationRequest, quality: Quality
    ) -> Generator[Progress | Result, None, None]:
        clock = _Clock(self._parts.device)
        grid = sampling.grid_for(request.width, request.height, self._info.size_multiple)
        conditioning = self._encode(request)
        clock.lap("encode_s")
        prepared = self._prepare(conditioning, request, grid)
        images: list[Image.Image] = []
        reused = 0
        for seeds in _chunks(request, self._max_batch_size):
            run = prepared.start(TIERS[quality])
            img = yield from self._denoise(request, run, grid, seeds)
            reused += run.reused * len(seeds)
            del run  # before decoding needs the room
            clock.lap("denoise_s")
            images += self._decode(img, grid, request)
            clock.lap("decode_s")
        yield Result(
            images=tuple(images),
            seeds=tuple(_seeds(request)),
            timings=clock.seconds,
            quality=quality,
            computed_steps=request.num_inference_steps * request.num_images - reused,
            reused_steps=reused,
        )

    def _encode(self, request: GenerationRequest) -> Conditioning:
        text = self._parts.text_encoders
        txt, vec = text.encode(request.prompt) if _needs_text(request) else text.zeros()
        redux = (Tokens(self._parts.image_encoder.encode(request.image)),)
        return Conditioning(txt, redux, vec, guidance=float(request.guidance_scale))

    def _denoise(
        self, request: GenerationRequest, run: Run, grid: Grid, seeds: list[int]
    ) -> Generator[Progress, None, Tensor]:
        """Latent tokens ``(len(seeds), L, C)`` after all steps.

        Inference mode is entered per step: held across a yield it would leak to the caller.
        """
        steps = request.num_inference_steps
        done, total = steps * (seeds[0] - request.seed), steps * request.num_images
        scheduler = self._scheduler(request, grid)
        img = self._noise(seeds, grid)
        fence = _fence(self._parts.device)
        for step in range(steps):
            img = _advance(run, scheduler, img, step)
            previous, fence = fence, _fence(self._parts.device)
            if previous is not None:  # never more than one step queued beyond what is reported
                previous.synchronize()
            yield Progress(done + (step + 1) * len(seeds), total)
        return img

    @torch.inference_mode()
    def _prepare(
        self, conditioning: Conditioning, request: GenerationRequest, grid: Grid
    ) -> PreparedDenoiser:
        schedule = sampling.schedule_of(self._scheduler(request, grid))
        return self._parts.denoiser.prepare(conditioning, schedule, grid)

    def _scheduler(self, request: GenerationRequest, grid: Grid) -> Scheduler:
        template, steps = self._parts.scheduler, request.num_inference_steps
        return sampling.start(template, steps, grid.tokens, self._parts.device)

    def _noise(self, seeds: list[int], grid: Grid) -> Tensor:
        channels = self._parts.autoencoder.channels
        latents = torch.cat([sampling.noise(seed, channels, grid) for seed in seeds])
        return sampling.pack(latents).to(self._parts.device, self._parts.dtype)

    def _decode(self, img: Tensor, grid: Grid, request: GenerationRequest) -> list[Image.Image]:
        decoded = self._parts.autoencoder.decode(sampling.unpack(img, grid))
        return [centre_crop(image, request.width, request.height) for image in decoded]


@torch.inference_mode()
def _advance(run: Run, scheduler: Scheduler, img: Tensor, step: int) -> Tensor:
    velocity = run.predict(img, step)
    return scheduler.step(velocity, scheduler.timesteps[step], img, return_dict=False)[0]


def _check_tier(denoiser: Denoiser, quality: Quality) -> None:
    if quality not in denoiser.qualities:
        allowed = ", ".join(map(repr, denoiser.qualities))
        raise RequestError(
            f"quality={quality!r} is not available with the backend {denoiser.name!r}, which has "
            f"{allowed}: ask for that, or use the backend 'engine'"
        )


def centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle ``width`` × ``height`` pixels; the picture itself where nothing is to be cut."""
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _needs_text(request: GenerationRequest) -> bool:
    return request.prompt != "" or request.empty_prompt == "encode"


def _seeds(request: GenerationRequest) -> list[int]:
    return [request.seed + index for index in range(request.num_images)]


def _chunks(request: GenerationRequest, size: int) -> Iterator[list[int]]:
    seeds = _seeds(request)
    for first in range(0, len(seeds), size):
        yield seeds[first : first + size]


def _fence(device: torch.device) -> torch.cuda.Event | None:
    """A mark on the device's queue to wait for; None on a CPU, where nothing is queued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class _Clock:
    """Seconds per stage, summed over laps; waits for the device before reading the time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
