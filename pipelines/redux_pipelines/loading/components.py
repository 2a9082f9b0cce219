"""The parts of a checkpoint, from a directory in diffusers' layout to modules on a device.

Plans the GPU's memory first, then puts every part where the plan says. Expects files that are
complete (``redux_weights.layout`` checks that); knows no hub and no model names.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors import SafetensorError
from torch import Tensor
from transformers import SiglipVisionModel

from redux_pipelines.attention import choice
from redux_pipelines.autoencoder import TILE_ABOVE_PIXELS, Autoencoder
from redux_pipelines.conditioning.image import ImageEncoder, Preprocessing
from redux_pipelines.conditioning.text import TextEncoders, TextSizes
from redux_pipelines.contract.types import LoadOptions
from redux_pipelines.denoising.denoiser import Denoiser
from redux_pipelines.denoising.diffusers_backend import DiffusersDenoiser
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.devices import resolve_device, resolve_dtype, slow_reason
from redux_pipelines.errors import MemoryPlanError, WeightsError
from redux_pipelines.fp8.weights import SCALE
from redux_pipelines.loading.flux_weights import Shards, load_flux
from redux_pipelines.loading.fp8_choice import (
    check_transformer_dtype,
    choose_tensors,
    refuse_fp8_files,
)
from redux_pipelines.memory.cards import Card, card_of
from redux_pipelines.memory.model_sizes import ModelSizes, read_sizes
from redux_pipelines.memory.offload import BlockStream, OnDemand
from redux_pipelines.memory.plan import MEMORY_MODES, Options, Placement, Plan, largest_demand, plan
from redux_pipelines.network import operator_choice
from redux_pipelines.network.flux import Flux, FluxParams
from redux_pipelines.pipeline import Components
from redux_pipelines.previews import latent_colours

logger = logging.getLogger(__name__)

_CPU = Card("the CPU", 0)


def load_components(base: Path, redux: Path, options: LoadOptions) -> Components:
    """Load everything but the text encoders, which load themselves when first used.

    Raises ``ValueError`` for a device, dtype, implementation or memory mode that is not there,
    ``AttentionError`` for an attention that cannot be used, ``WeightsError`` for files that are not
    what their place says, ``MemoryPlanError`` for a GPU that is too small.
    """
    check_memory(options.memory, options.backend)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    if (reason := slow_reason(device, dtype)) is not None:
        logger.warning("%s", reason)
    config, tensors, plan = _planned(base, redux, options, device, dtype)
    with _weights_errors(base, redux):
        vae = AutoencoderKL.from_pretrained(base / "vae", dtype=dtype)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base / "scheduler")
        siglip = SiglipVisionModel.from_pretrained(redux / "image_encoder", dtype=dtype)
        embedder = ReduxImageEncoder.from_pretrained(redux / "image_embedder", dtype=dtype)
        preprocessing = Preprocessing.read(redux / "feature_extractor" / "preprocessor_config.json")
        _check_fit(config, vae, siglip, embedder)
        if options.backend == "diffusers":
            denoiser: Denoiser = _diffusers_denoiser(base / "transformer", config, device, dtype)
        else:
            denoiser = _engine_denoiser(
                config, tensors, options, plan=plan, device=device, dtype=dtype
            )
        sizes = TextSizes.of(config, base)
    return Components(
        image_encoder=_image_encoder(siglip, embedder, preprocessing, device, plan),
        text_encoders=TextEncoders(
            base,
            sizes,
            device=device,
            dtype=dtype,
            on_demand=plan.placement_of("T5") is not Placement.GPU,
        ),
        denoiser=denoiser,
        autoencoder=_autoencoder(vae, device, plan),
        scheduler=scheduler,
        device=device,
        dtype=dtype,
        plan=plan,
        has_fp8=isinstance(denoiser, EngineDenoiser) and denoiser.has_fp8,
        colours=latent_colours(base / "vae", vae.config, device),
    )


def load_engine(base: Path, redux: Path, options: LoadOptions) -> EngineDenoiser:
    """The transformer alone, as ``load_components`` does for the engine; raises what that does."""
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    config, tensors, plan = _planned(base, redux, options, device, dtype)
    with _weights_errors(base, redux):
        return _engine_denoiser(config, tensors, options, plan=plan, device=device, dtype=dtype)


def _planned(
    base: Path, redux: Path, options: LoadOptions, device: torch.device, dtype: torch.dtype
) -> tuple[Mapping[str, Any], Mapping[str, Tensor], Plan]:
    """The transformer's configuration, its tensors, none of them read yet, and what goes where."""
    check_transformer_dtype(options.transformer_dtype, options.backend, device, dtype)
    with _weights_errors(base, redux):
        model = read_sizes(base, redux)
        config = FluxTransformer2DModel.load_config(base / "transformer")
        tensors = _tensors(base / "transformer", config, options, device, dtype)
    has_scales = any(name.endswith(SCALE) for name in tensors)
    return config, tensors, plan_here(model, options, device=device, dtype=dtype, is_fp8=has_scales)


def check_memory(memory: str, backend: str) -> None:
    """Raise ``ValueError`` for a mode that does not exist or that ``backend`` cannot carry out."""
    if memory not in MEMORY_MODES:
        names = ", ".join(repr(mode) for mode in MEMORY_MODES)
        raise ValueError(f"memory={memory!r} is not one of {names}")
    if backend == "diffusers" and memory not in ("auto", "resident"):
        raise ValueError(
            f"memory={memory!r} needs backend='engine'; 'diffusers' knows 'auto' and 'resident'"
        )


def plan_here(
    sizes: ModelSizes,
    how: LoadOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
    is_fp8: bool,
) -> Plan:
    """The plan for a checkpoint of these ``sizes``, written to the log if it is one for a GPU.

    ``is_fp8``: the transformer's matrices will be in fp8. On a CPU ``auto`` is ``resident``;
    ``evict`` and ``offload`` then put into host memory whatever they can, which gains nothing
    there. Raises ``MemoryPlanError``.
    """
    has_graphs = device.type == "cuda" and how.backend == "engine"
    options = Options(
        dtype=str(dtype).removeprefix("torch."),
        is_fp8=is_fp8,
        demand=largest_demand(sizes, how.max_batch_size),
        cuda_graphs=how.cuda_graphs if has_graphs else 0,
    )
    if device.type != "cuda":
        return plan(sizes, _CPU, options, "resident" if how.memory == "auto" else how.memory)
    mode = "resident" if how.backend == "diffusers" else how.memory
    made = plan(sizes, card_of(device), options, mode)
    logger.info("memory plan: %s", made.describe())
    if not made.fits:
        logger.warning("memory plan: %s", made.shortage)
    return made


@contextmanager
def _weights_errors(base: Path, redux: Path) -> Iterator[None]:
    """Turn what loaders raise for unusable files into ``WeightsError``."""
    try:
        yield
    except torch.OutOfMemoryError as error:  # a RuntimeError, but not the files' fault
        raise MemoryPlanError(
            "the GPU's memory was used up while the weights were loaded: choose memory='auto', or "
            f"free memory on it ({str(error).splitlines()[0]})"
        ) from error
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{base} and {redux} cannot be loaded: {error}") from error


def _diffusers_denoiser(
    folder: Path, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> DiffusersDenoiser:
    refuse_fp8_files(config)
    model = FluxTransformer2DModel.from_pretrained(folder, dtype=dtype)
    return DiffusersDenoiser(_ready(model, device))


def _tensors(
    folder: Path,
    config: Mapping[str, Any],
    options: LoadOptions,
    device: torch.device,
    dtype: torch.dtype,
) -> Mapping[str, Tensor]:
    """The transformer's tensors, none of them read yet; with scales where it will run in fp8."""
    if options.backend == "diffusers":
        return {}
    wanted = options.transformer_dtype
    return choose_tensors(wanted, config, Shards(folder), device=device, dtype=dtype)


def _engine_denoiser(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    options: LoadOptions,
    *,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
) -> EngineDenoiser:
    params = FluxParams.of(config)
    flux = load_flux(
        params,
        tensors,
        device=device,
        dtype=dtype,
        evict_modulation=plan.placement_of("modulation") is not Placement.GPU,
        streamed_blocks=plan.streamed_blocks,
    )
    if plan.streamed_blocks:
        stream_blocks(flux, plan.streamed_blocks, device)
    chosen = operator_choice.choose(
        device,
        dtype,
        num_heads=params.num_heads,
        head_dim=params.head_dim,
        fp8=flux.has_fp8,
    )
    for name, reason in chosen.refusals.items():
        logger.log(_level(device), "operators: %s is not used: %s", name, reason)
    # after the kernels' own test, so that attention's includes the merging one
    attend = choice.resolve(options.attention, device, dtype, params.head_dim)
    for name, reason in attend.refusals.items():
        logger.debug("attention %s is not used: it %s", name, reason)
    logger.info("attention: %s, operators: %s", attend.attention.name, chosen.operators.name)
    return EngineDenoiser(flux, attend.attention, chosen.operators)


def stream_blocks(flux: Flux, streamed: Collection[int], device: torch.device) -> None:
    """Let ``streamed`` blocks of ``flux``, which are in host memory, come when they are needed."""
    stream = BlockStream(flux.blocks, streamed, device)
    stream.open()
    flux.blocks_ready = stream.ready


def _level(device: torch.device) -> int:
    """A refused kernel is news on a GPU only."""
    return logging.WARNING if device.type == "cuda" else logging.DEBUG


def _autoencoder(vae: torch.nn.Module, device: torch.device, plan: Plan) -> Autoencoder:
    """On a GPU a picture is decoded whole only if the plan has room for that."""
    room = plan.tile_above_pixels if device.type == "cuda" else TILE_ABOVE_PIXELS
    tile_above = min(room, TILE_ABOVE_PIXELS)
    return Autoencoder(_ready(vae, device), tile_above_pixels=tile_above)


def _image_encoder(
    siglip: torch.nn.Module,
    embedder: torch.nn.Module,
    preprocessing: Preprocessing,
    device: torch.device,
    plan: Plan,
) -> ImageEncoder:
    if plan.placement_of("SigLIP") is Placement.GPU:
        return ImageEncoder(_ready(siglip, device), _ready(embedder, device), preprocessing)
    both = _ready(torch.nn.ModuleList([siglip, embedder]), torch.device("cpu"))
    return ImageEncoder(siglip, embedder, preprocessing, OnDemand(both, device))


def _ready(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    return module.to(device).eval().requires_grad_(False)


def _check_fit(
    transformer: Mapping[str, Any],
    vae: AutoencoderKL,
    siglip: SiglipVisionModel,
    embedder: ReduxImageEncoder,
) -> None:
    """Raise ``WeightsError`` where a base and a Redux of different families were mixed."""
    pairs = (
        ("Redux tokens", embedder.config.txt_in_features, transformer["joint_attention_dim"]),
        ("SigLIP features", siglip.config.hidden_size, embedder.config.redux_dim),
        ("latent channels", 4 * vae.config.latent_channels, transformer["in_channels"]),
    )
    for what, given, expected in pairs:
        if given != expected:
            raise WeightsError(f"{what} are {given} wide, but {expected} is expected of them")
