"""What is measured: the real pipeline at one ``Scale``, its weights random and made on the device.

Loaded as ``loading.components`` loads a checkpoint: by a memory plan for what is free, through
``load_flux``, with the operators and the attention that prove themselves. One transformer is there
at a time. Has no text encoders, so prompts are empty. Measures only how long loading takes.
"""

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from gpu_report.clock import synchronize
from gpu_report.random_weights import RandomTensors, filled
from gpu_report.runner import NotRun
from gpu_report.scale import Scale
from redux_pipelines.attention import choice
from redux_pipelines.autoencoder import TILE_ABOVE_PIXELS, Autoencoder
from redux_pipelines.conditioning.image import ImageEncoder, Preprocessing
from redux_pipelines.conditioning.text import TextEncoders, TextSizes
from redux_pipelines.conditioning.tokens import Conditioning, Tokens
from redux_pipelines.contract.types import LoadOptions
from redux_pipelines.denoising.denoiser import Denoiser, PreparedDenoiser
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.errors import MemoryPlanError
from redux_pipelines.fp8.weights import Quantized
from redux_pipelines.loading.components import plan_here, stream_blocks
from redux_pipelines.loading.flux_weights import fp8_layers, load_flux
from redux_pipelines.memory.model_sizes import EncoderSize, ModelSizes, TransformerSize
from redux_pipelines.memory.offload import OnDemand
from redux_pipelines.memory.plan import Placement, Plan, largest_demand, plan
from redux_pipelines.network import operator_choice
from redux_pipelines.network.flux import FluxParams
from redux_pipelines.pipeline import Components, ReduxPipeline
from redux_pipelines.sampling import PATCH, Grid, Schedule, grid_for

TEXT_TOKENS = 512
GUIDANCE = 4.0
"""As 4000 and, of times, 500: bfloat16 has them exactly, so that float32 gets the same request."""
SCHEDULE = Schedule((1.0, 0.5, 0.0))
STEP = 1
"""Of ``SCHEDULE``, at time 0.5."""


def even_schedule(steps: int) -> Schedule:
    """``steps`` of one length, from 1 to 0."""
    return Schedule(tuple(1 - index / steps for index in range(steps + 1)))


def a_picture(turn: int = 0) -> Image.Image:
    """A picture to vary: a radial gradient in colour, others by other turns."""
    grey = Image.radial_gradient("L")
    return Image.merge(
        "RGB", (grey, grey.rotate(90 * turn + 90), grey.transpose(Image.Transpose(turn % 2)))
    )


@dataclass(frozen=True)
class Loaded:
    """A pipeline's parts, how long making them took, and what was chosen for them."""

    components: Components
    load_s: float
    chosen: Mapping[str, Any]

    @property
    def engine(self) -> EngineDenoiser:
        """The transformer's backend."""
        assert isinstance(self.components.denoiser, EngineDenoiser)
        return self.components.denoiser


class Subject:
    """Makes pipelines of one ``scale`` on ``device`` in ``dtype``; the last one is kept."""

    def __init__(self, scale: Scale, device: torch.device, dtype: torch.dtype) -> None:
        self.scale, self.device, self.dtype = scale, device, dtype
        self._loaded: dict[bool, Loaded] = {}

    def load(self, *, is_fp8: bool = False) -> Loaded:
        """The parts with the transformer in ``dtype`` or in fp8; the other one is let go.

        Raises ``NotRun`` where no memory plan fits the card.
        """
        if is_fp8 not in self._loaded:
            self.forget()
            started = time.perf_counter()
            components, chosen = self._components(is_fp8)
            synchronize(self.device)
            load_s = round(time.perf_counter() - started, 2)
            self._loaded[is_fp8] = Loaded(components, load_s, chosen)
        return self._loaded[is_fp8]

    def pipeline(self, *, is_fp8: bool = False, batch: int = 1) -> ReduxPipeline:
        """A pipeline of those parts for up to ``batch`` images together."""
        components = self.load(is_fp8=is_fp8).components
        if batch > 1:
            made = components.plan  # the card as it was before the weights came
            options = replace(made.options, demand=largest_demand(self.sizes, batch))
            components = replace(components, plan=plan(self.sizes, made.card, options, made.mode))
        return ReduxPipeline(components, name="random", max_batch_size=batch)

    def forget(self) -> None:
        """Free the weights."""
        self._loaded.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tensors(self, dtype: torch.dtype | None = None, **config: Any) -> RandomTensors:
        """Weights of the transformer, with another ``config`` where one is given."""
        config = {**self.scale.transformer, **config}
        return RandomTensors(config, self.device, dtype or self.dtype)

    def conditioning(self, components: Components) -> Conditioning:
        """Of a request without a prompt, with one picture."""
        txt, vec = components.text_encoders.zeros()
        picture = components.image_encoder.encode(a_picture())
        return Conditioning(txt, (Tokens(picture),), vec, GUIDANCE)

    def step_of(
        self,
        denoiser: Denoiser,
        given: Conditioning,
        side: int,
        batch: int = 1,
        *,
        schedule: Schedule = SCHEDULE,
    ) -> tuple[PreparedDenoiser, Tensor]:
        """What predicts a step for ``side`` × ``side`` pixels, and the noise to give it."""
        grid = self.grid(side)
        with torch.inference_mode():
            prepared = denoiser.join([denoiser.prepare(given, schedule, grid)] * batch)
        return prepared, self.noise(grid, batch)

    def grid(self, side: int) -> Grid:
        """Tokens of a square picture."""
        return grid_for(side, side, PATCH * 2 ** (len(self.scale.vae["block_out_channels"]) - 1))

    def noise(self, grid: Grid, batch: int = 1) -> Tensor:
        """Packed latents ``(B, L, C)``, numbers of bfloat16 in ``dtype``."""
        shape = (batch, grid.tokens, self.scale.transformer["in_channels"])
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        return drawn.bfloat16().to(self.device, self.dtype)

    @cached_property
    def sizes(self) -> ModelSizes:
        """What the memory plan is made of; there are no text encoders."""
        return _sizes(self.scale)

    def _components(self, is_fp8: bool) -> tuple[Components, Mapping[str, Any]]:
        try:
            made = plan_here(
                self.sizes, LoadOptions(), device=self.device, dtype=self.dtype, is_fp8=is_fp8
            )
        except MemoryPlanError as error:
            raise NotRun(str(error)) from error
        denoiser, chosen = self._engine(made, is_fp8)
        config = self.scale.transformer
        sizes = TextSizes(
            config["joint_attention_dim"], config["pooled_projection_dim"], TEXT_TOKENS
        )
        nowhere = Path("no-text-encoders")
        return Components(
            image_encoder=self._image_encoder(made),
            text_encoders=TextEncoders(nowhere, sizes, device=self.device, dtype=self.dtype),
            denoiser=denoiser,
            autoencoder=self._autoencoder(made),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            device=self.device,
            dtype=self.dtype,
            plan=made,
            has_fp8=is_fp8,
        ), {**chosen, "plan": made.summary}

    def _engine(self, made: Plan, is_fp8: bool) -> tuple[EngineDenoiser, Mapping[str, Any]]:
        params = FluxParams.of(self.scale.transformer)
        tensors: Mapping[str, Tensor] = self.tensors()
        if is_fp8:
            tensors = Quantized(tensors, fp8_layers(params), self.device)
        flux = load_flux(
            params,
            tensors,
            device=self.device,
            dtype=self.dtype,
            evict_modulation=made.placement_of("modulation") is not Placement.GPU,
            streamed_blocks=made.streamed_blocks,
        )
        if made.streamed_blocks:
            stream_blocks(flux, made.streamed_blocks, self.device)
        operators, attention, chosen = implementations(self.device, self.dtype, params, is_fp8)
        return EngineDenoiser(flux, attention, operators), chosen

    def _image_encoder(self, made: Plan) -> ImageEncoder:
        siglip, embedder = (make() for make in _vision(self.scale))
        is_here = made.placement_of("SigLIP") is Placement.GPU
        where = self.device if is_here else torch.device("cpu")
        both = nn.ModuleList([filled(each, where, self.dtype) for each in (siglip, embedder)])
        side = self.scale.siglip["image_size"]
        presence = None if is_here else OnDemand(both, self.device)
        return ImageEncoder(both[0], both[1], Preprocessing(side, side), presence)

    def _autoencoder(self, made: Plan) -> Autoencoder:
        vae = filled(_vae(self.scale), self.device, self.dtype)
        return Autoencoder(vae, tile_above_pixels=min(made.tile_above_pixels, TILE_ABOVE_PIXELS))


def implementations(
    device: torch.device, dtype: torch.dtype, params: FluxParams, is_fp8: bool
) -> tuple[Any, Any, dict[str, Any]]:
    """Operators and attention as a loaded model has them, and why others were refused."""
    operators = operator_choice.choose(
        device, dtype, num_heads=params.num_heads, head_dim=params.head_dim, fp8=is_fp8
    )
    attention = choice.resolve(choice.AUTO, device, dtype, params.head_dim)
    chosen = {
        "operators": type(operators.operators).__name__,
        "operators_refused": dict(operators.refusals),
        "attention": attention.attention.name,
        "attention_refused": dict(attention.refusals),
    }
    return operators.operators, attention.attention, chosen


def _vision(scale: Scale) -> tuple[Any, Any]:
    width = scale.transformer["joint_attention_dim"]

    def siglip() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = SiglipVisionModel(SiglipVisionConfig(**scale.siglip))
        return model

    def embedder() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = ReduxImageEncoder(
                redux_dim=scale.siglip["hidden_size"], txt_in_features=width
            )
        return model

    return siglip, embedder


def _vae(scale: Scale) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoencoderKL(**scale.vae)
    return model


def _sizes(scale: Scale) -> ModelSizes:
    siglip, embedder = (make() for make in _vision(scale))
    return ModelSizes(
        transformer=TransformerSize.of(scale.transformer),
        t5=None,
        clip=None,
        siglip=EncoderSize(
            parameters=_count(siglip),
            width=scale.siglip["hidden_size"],
            inner=scale.siglip["intermediate_size"],
            heads=scale.siglip["num_attention_heads"],
            tokens=(scale.siglip["image_size"] // scale.siglip["patch_size"]) ** 2,
        ),
        redux=_count(embedder),
        vae=_count(_vae(scale)),
        vae_channels=tuple(scale.vae["block_out_channels"]),
    )


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())
