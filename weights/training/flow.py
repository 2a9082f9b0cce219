"""Rectified-flow training targets, FLUX's noise levels and a batched sampler.

Token grids, packing and schedule are the product's own (``redux_pipelines.sampling``). Knows the
model's interface; knows no data.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from redux_pipelines import sampling
from redux_pipelines.sampling import Grid
from training.model import MiniModel
from training.precision import autocast

_GUIDANCE_RISE = 8.0
_GUIDANCE_MOST = 1.5


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def shift_times(times: Tensor, tokens: int) -> Tensor:
    """Noise levels 0…1 moved towards noise as sampling does for that many image tokens."""
    stretch = math.exp(sampling.shift_mu(tokens, make_scheduler().config))
    return stretch * times / (1 + (stretch - 1) * times)


def guidance_strength(guidance: Tensor) -> Tensor:
    """Scale of classifier-free guidance that a value of ``guidance_scale`` (1…20) stands for.

    1 at 1, about 1.45 at 3.5, and never above 2.5, so that no setting breaks pictures.
    """
    return 1 + _GUIDANCE_MOST * torch.tanh((guidance - 1) / _GUIDANCE_RISE)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What steers a batch: ``tokens (B, T, D)`` (text, then Redux), ``pooled (B, P)``."""

    tokens: Tensor
    pooled: Tensor


def predict(
    model: MiniModel, img: Tensor, times: Tensor, guidance: Tensor, given: Conditions, grid: Grid
) -> Tensor:
    """Velocity of latent tokens ``img (B, L, C)`` at noise levels ``times (B,)``, float32."""
    velocity: Tensor = model.transformer(
        hidden_states=img,
        timestep=times,
        guidance=guidance,
        pooled_projections=given.pooled,
        encoder_hidden_states=given.tokens,
        txt_ids=torch.zeros(given.tokens.shape[1], 3),
        img_ids=sampling.image_ids(grid),
        return_dict=False,
    )[0]
    return velocity.float()


def add_noise(img: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """The point at ``times (B,)`` on the straight line from ``img`` to ``noise``."""
    weight = times[:, None, None]
    return (1 - weight) * img + weight * noise


@torch.no_grad()
def sample(model: MiniModel, given: Conditions, grid: Grid, **options: Any) -> Tensor:
    """Scaled latents ``(B, C, 2·rows, 2·columns)``; options: ``steps``, ``guidance``, ``seed``."""
    steps, seed = options.get("steps", 28), options.get("seed", 0)
    batch = len(given.tokens)
    channels = model.transformer.config.in_channels // 4
    noise = torch.cat([sampling.noise(seed, channels, grid) for _ in range(batch)])
    img = sampling.pack(noise)
    scheduler = sampling.start(make_scheduler(), steps, grid.tokens, torch.device("cpu"))
    guidance = torch.full((batch,), float(options.get("guidance", 3.5)))
    for time in scheduler.timesteps:
        with autocast():
            velocity = predict(model, img, time.expand(batch) / 1000, guidance, given, grid)
        img = scheduler.step(velocity, time, img, return_dict=False)[0]
    return sampling.unpack(img, grid)
