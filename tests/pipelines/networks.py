"""Random FLUX transformers of any size: diffusers' as the oracle, ours with the same weights."""

import torch
from diffusers import FluxTransformer2DModel

from redux_pipelines.attention.choice import choose
from redux_pipelines.conditioning.tokens import Conditioning, Tokens
from redux_pipelines.denoising.diffusers_backend import DiffusersDenoiser
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.loading.flux_weights import load_flux
from redux_pipelines.network.flux import FluxParams
from redux_pipelines.network.operators import TorchOperators
from redux_pipelines.sampling import Grid, Schedule

CPU = torch.device("cpu")
SCHEDULE = Schedule((1.0, 0.83, 0.41, 0.0))

SMALL = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
FULL_WIDTH = {"guidance_embeds": True, "num_layers": 1, "num_single_layers": 1}


def diffusers_model(dtype=torch.float32, *, seed=0, **config):
    """Weights such that every part of the network matters: norms off 1, biases off 0."""
    model = FluxTransformer2DModel(**{**SMALL, **config}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm_" in name and parameter.ndim == 1 and "linear" not in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.normal_(0, 0.1, generator=generator)
    return model.to(dtype)


def engine(model, **options):
    """Our network with the weights of diffusers' ``model``, in its dtype."""
    params = FluxParams.of(model.config)
    attention, device = options.pop("attention", None), options.pop("device", CPU)
    if attention is None:
        attention = choose(device, model.dtype, params.head_dim).attention
    tensors = model.state_dict()
    operators = options.pop("operators", TorchOperators())
    flux = load_flux(params, tensors, device=device, dtype=model.dtype, **options)
    return EngineDenoiser(flux, attention, operators)


def conditioning(model, *, text=7, copies=1, redux=(5,), seed=1, guidance=3.5):
    """Random tokens; ``copies`` > 1 makes all text tokens equal."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(model.dtype)

    width = model.config.joint_attention_dim
    txt = Tokens(random(1 if copies > 1 else text, width), copies=copies)
    sets = tuple(Tokens(random(rows, width)) for rows in redux)
    return Conditioning(txt, sets, random(model.config.pooled_projection_dim), guidance)


def noise(model, grid, batch=1, seed=2):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, grid.tokens, model.config.in_channels)
    return torch.randn(shape, generator=generator).to(model.dtype)


@torch.inference_mode()
def predict(denoiser, given, grid, img, step=1, schedule=SCHEDULE):
    return denoiser.prepare(given, schedule, grid).predict(img, step)


def oracle(model, given, grid, img, step=1, schedule=SCHEDULE):
    return predict(DiffusersDenoiser(model), given, grid, img, step, schedule)


def error(ours, theirs):
    """Relative error in the Euclidean norm."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def small_grid(rows=4, columns=6):
    return Grid(rows, columns)
