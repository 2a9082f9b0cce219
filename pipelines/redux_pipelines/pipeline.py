"""The pipeline: encode a picture and a prompt, denoise, decode, crop.

It steps diffusers' modules itself, as a generator, so that progress, cancelling and memory belong
to the caller. Knows neither where checkpoints come from nor which transformer backend runs.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from PIL import Image
from torch import Tensor

from redux_pipelines import devices, sampling
from redux_pipelines.autoencoder import Autoencoder
from redux_pipelines.conditioning.image import ImageEncoder
from redux_pipelines.conditioning.redux_tokens import redux_tokens, worth_pictures
from redux_pipelines.conditioning.text import TextEncoders
from redux_pipelines.conditioning.tokens import Conditioning
from redux_pipelines.contract.batching import check_together, has_text
from redux_pipelines.contract.types import (
    LEAST_SIDE,
    BatchEvent,
    CacheStats,
    CompilePlan,
    CompileReport,
    GenerationRequest,
    ModelInfo,
    Progress,
    Quality,
    Result,
)
from redux_pipelines.contract.validation import check_request
from redux_pipelines.denoising.denoiser import Denoiser, PreparedDenoiser, Run
from redux_pipelines.denoising.quality import TIERS
from redux_pipelines.denoising.warm_up import compiled_mode, warm_up
from redux_pipelines.devices import Clock, fence_on
from redux_pipelines.errors import OutputError, RequestError
from redux_pipelines.jobs import Job, Row, images_per_request, only, rows_of
from redux_pipelines.memory.plan import Plan
from redux_pipelines.previews import LatentColours
from redux_pipelines.sampling import Grid, Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Components:
    """The loaded parts of a checkpoint, for one device in one dtype.

    ``scheduler`` is a template that is copied, never stepped. ``plan`` says where the weights live.
    ``has_fp8``: large layers of the transformer are not in ``dtype``, but in fp8. ``parallel``: so
    many devices run the denoiser. ``colours``: previews are made by it, or there are none.
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
    parallel: int = 1
    colours: LatentColours | None = None

    @property
    def dtype_name(self) -> str:
        """For ``ModelInfo``: such as ``bfloat16``, or ``bfloat16 with fp8``."""
        return str(self.dtype).removeprefix("torch.") + (" with fp8" if self.has_fp8 else "")


class ReduxPipeline:
    """FLUX.1 + Redux: variations of a picture.

    With ``max_batch_size=1`` each image of a request is denoised on its own and is bitwise the
    same however many are asked for; larger batches, of one request or of several, agree to about
    one grey level in 255, unless the step cache of a ``quality`` below exact decides differently
    for them: a batch decides as one.
    """

    def __init__(
        self,
        components: Components,
        *,
        name: str,
        max_batch_size: int = 1,
        quality: Quality = "exact",
        weights: str = "",
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size={max_batch_size} must be at least 1")
        _check_tier(components.denoiser, quality)
        self._components = components
        self._quality = quality
        self._max_batch_size = max_batch_size
        self._info = ModelInfo(
            name=name,
            backend=components.denoiser.name,
            device=str(components.device),
            dtype=components.dtype_name,
            size_multiple=sampling.PATCH * components.autoencoder.factor,
            attention=components.denoiser.attention,
            parallel=components.parallel,
            weights=weights,
        )

    @property
    def info(self) -> ModelInfo:
        """What was loaded, and what of it runs compiled."""
        return replace(self._info, compiled=compiled_mode(self._components.denoiser))

    def compile(self, plan: CompilePlan) -> CompileReport:
        """Warm up the transformer. Raises ``ValueError`` for another backend than the engine."""
        *grids, least = (
            sampling.grid_for(width, height, self._info.size_multiple)
            for width, height in (*plan.sizes, (LEAST_SIDE, LEAST_SIDE))
        )
        batches = (1,) if self._max_batch_size == 1 else (1, 2)
        denoiser, limits = self._components.denoiser, self._components.plan.graphs
        with devices.as_current(self._components.device):
            return warm_up(denoiser, plan, grids, batches, limits=limits, least=least)

    def cache_stats(self) -> dict[str, CacheStats]:
        """Those of the prompts, of the pictures, and of what the denoiser keeps."""
        components = self._components
        stats = {name: cache.stats for name, cache in components.denoiser.caches.items()}
        stats["prompts"] = components.text_encoders.cache.stats
        stats["pictures"] = components.image_encoder.cache.stats
        return stats

    def preprocess(self, request: GenerationRequest) -> GenerationRequest:
        """The request with its pictures as the image encoder sees them, which may take a while.

        For the same images, bit for bit. From any thread. Raises ``RequestError`` and
        ``ImageError``.
        """
        check_request(request)
        preprocess = self._components.image_encoder.preprocess
        return replace(
            request,
            image=preprocess(request.image, request.fit, request.mask),
            images=tuple(preprocess(each, request.fit) for each in request.images),
        )

    def generate(self, request: GenerationRequest) -> Generator[Progress | Result, None, None]:
        """Check the request at once; then yield a ``Progress`` per step and one ``Result``.

        Nothing is computed before the first ``next``. Closing the generator frees all it holds.
        A step of a batch of images counts once for each. On a GPU the step last reported may
        still be running. Raises ``RequestError``; ``DeviceMemoryError``, ``DeviceError`` and
        ``OutputError`` once it runs.
        """
        return only(self.generate_batch([request]))

    def generate_batch(
        self, requests: Sequence[GenerationRequest]
    ) -> Generator[BatchEvent, None, None]:
        """Check all requests at once; then yield as ``Pipeline`` says, ``generate`` for the rest.

        Images are taken in their order, ``max_batch_size`` at a time, half as many each time that
        they do not fit into the device's memory. To be no longer interested in one request, let
        its events pass by: its images are made with the others.
        """
        for request in requests:
            check_request(request)
            if has_text(request):
                self._components.text_encoders.require()
        requests = [replace(each, quality=each.quality or self._quality) for each in requests]
        check_together(requests)
        quality = requests[0].quality or self._quality
        _check_tier(self._components.denoiser, quality)
        for request in requests:
            self._check_memory(request)
        events = self._run(requests, quality)
        return devices.each_as_current(self._components.device, events)

    def _check_memory(self, request: GenerationRequest) -> None:
        """Raise ``RequestError`` for what the plan of a GPU's memory has no room for."""
        if self._components.device.type != "cuda":
            return
        reason = self._components.plan.refusal(
            request.width,
            request.height,
            min(request.num_images, self._max_batch_size),
            pictures=worth_pictures(request, self._components.image_encoder.grid),
            multiple=self._info.size_multiple,
        )
        if reason is not None:
            raise RequestError(reason)

    def _run(
        self, requests: Sequence[GenerationRequest], quality: Quality
    ) -> Generator[BatchEvent, None, None]:
        with devices.translated(self._advice(requests[0])):
            clock = Clock(self._components.device)
            grid = self._grid(requests[0])
            jobs = [Job(each, quality) for each in requests]
            prepared = []
            for job in jobs:
                prepared.append(self._prepare(job.request, grid))
                clock.lap("encode_s", [job])
            rows, size = rows_of(requests), self._max_batch_size
            while rows:
                chunk = rows[:size]
                try:
                    yield from self._run_chunk(chunk, jobs, prepared, grid, clock)
                except RuntimeError as error:
                    if len(chunk) == 1 or not devices.is_out_of_memory(error):
                        raise
                    size = len(chunk) // 2
                    logger.warning("%d images do not fit, next %d: %s", len(chunk), size, error)
                    devices.forget(error)
                    continue
                rows = [row for row in rows[size:] if jobs[row.request].error is None]
                for index in images_per_request(chunk):
                    if jobs[index].is_settled:
                        yield index, jobs[index].end()

    def _run_chunk(
        self,
        chunk: list[Row],
        jobs: list[Job],
        prepared: list[PreparedDenoiser],
        grid: Grid,
        clock: Clock,
    ) -> Generator[BatchEvent, None, None]:
        """Denoise and decode the images of ``chunk``; jobs get them, or what spoiled one."""
        shares = images_per_request(chunk)
        running = [jobs[index] for index in shares]
        together = self._components.denoiser.join([prepared[row.request] for row in chunk])
        run = together.start(TIERS[running[0].quality])
        img = yield from self._denoise(chunk, run, jobs, grid)
        reused = run.reused
        del run, together  # before decoding needs the room
        clock.lap("denoise_s", running)
        images = [self._decode(each[None], grid) for each in img]
        clock.lap("decode_s", running)
        for row, image in zip(chunk, images, strict=True):
            jobs[row.request].take(image, reused=reused)

    def _advice(self, request: GenerationRequest) -> str:
        size = f"{request.width} × {request.height} pixels"
        if self._components.device.type == "cpu":
            return f"an image of {size} needs more memory than there is: ask for a smaller one"
        mode = self._components.plan.mode
        more = ", with fewer pictures" if request.images else ""
        more += "" if mode == "offload" else ", or start the server with --memory offload"
        return (
            f"an image of {size} does not fit into what is free of the memory of "
            f"{self._components.device}, with --memory {mode}: ask for a smaller one{more}"
        )

    def _encode(self, request: GenerationRequest) -> Conditioning:
        text = self._components.text_encoders
        txt, vec = text.encode(request.prompt) if has_text(request) else text.zeros()
        redux = redux_tokens(self._components.image_encoder, request)
        return Conditioning(txt, redux, vec, guidance=float(request.guidance_scale))

    def _denoise(
        self, chunk: list[Row], run: Run, jobs: list[Job], grid: Grid
    ) -> Generator[BatchEvent, None, Tensor]:
        """Latent tokens ``(len(chunk), L, C)`` after all steps.

        Inference mode is entered per step: held across a yield it would leak to the caller.
        """
        shares = images_per_request(chunk)
        steps = jobs[chunk[0].request].request.num_inference_steps
        scheduler = self._scheduler(steps, grid)
        img = self._noise([row.seed for row in chunk], grid)
        fence = fence_on(self._components.device)
        for step in range(steps):
            img, velocity = _advance(run, scheduler, img, step)
            previous, fence = fence, fence_on(self._components.device)
            if previous is not None:  # never more than one step queued beyond what is reported
                previous.synchronize()
            look = self._look(img, velocity, scheduler.sigmas[step + 1], grid)
            for row, (index, images) in zip(_first_rows(shares), shares.items(), strict=True):
                yield index, jobs[index].progress(step + 1, images, look and partial(look, row))
        return img

    def _look(
        self, img: Tensor, velocity: Tensor, sigma: Tensor, grid: Grid
    ) -> Callable[[int], Image.Image] | None:
        """What makes a small picture of a row of ``img``; None where the model has no colours."""
        colours = self._components.colours
        if colours is None:
            return None
        return lambda row: colours.picture(img[row, None], velocity[row, None], sigma, grid)

    @torch.inference_mode()
    def _prepare(self, request: GenerationRequest, grid: Grid) -> PreparedDenoiser:
        schedule = sampling.schedule_of(self._scheduler(request.num_inference_steps, grid))
        return self._components.denoiser.prepare(self._encode(request), schedule, grid)

    def _grid(self, request: GenerationRequest) -> Grid:
        return sampling.grid_for(request.width, request.height, self._info.size_multiple)

    def _scheduler(self, steps: int, grid: Grid) -> Scheduler:
        return sampling.start(
            self._components.scheduler, steps, grid.tokens, self._components.device
        )

    def _noise(self, seeds: list[int], grid: Grid) -> Tensor:
        channels = self._components.autoencoder.channels
        latents = torch.cat([sampling.noise(seed, channels, grid) for seed in seeds])
        return sampling.pack(latents).to(self._components.device, self._components.dtype)

    def _decode(self, img: Tensor, grid: Grid) -> Image.Image | OutputError:
        """The picture of ``img (1, L, C)``, as large as the grid, or why there is none."""
        try:
            (image,) = self._components.autoencoder.decode(sampling.unpack(img, grid))
        except OutputError as error:
            return error
        return image


@torch.inference_mode()
def _advance(run: Run, scheduler: Scheduler, img: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The tokens after a step, and the velocity that brought them there."""
    velocity = run.predict(img, step)
    after = scheduler.step(velocity, scheduler.timesteps[step], img, return_dict=False)[0]
    return after, velocity


def _first_rows(shares: Mapping[int, int]) -> Iterator[int]:
    """The row of the first image of each request that has images in a batch."""
    return accumulate(list(shares.values())[:-1], initial=0)


def _check_tier(denoiser: Denoiser, quality: Quality) -> None:
    if quality not in denoiser.qualities:
        allowed = ", ".join(map(repr, denoiser.qualities))
        raise RequestError(
            f"quality={quality!r} is not available with the backend {denoiser.name!r}, which has "
            f"{allowed}: ask for that, or use the backend 'engine'"
        )
