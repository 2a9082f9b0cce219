"""FLUX's sampling arithmetic: token grids, noise, packing, position ids and the schedule.

Pure functions on sizes and tensors, in BFL's words (``img``, ``img_ids``). Knows nothing of the
networks. Follows black-forest-labs/flux ``sampling.py`` and diffusers' ``FluxPipeline``.
"""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_TORCH_SEEDS = 2**32  # that differ on a CPU
PATCH = 2
"""Latent pixels per token along each side."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Image tokens as ``rows`` × ``columns``; each covers a square of the model's size multiple."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Image tokens in all."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Schedule:
    """``N + 1`` noise levels from 1 down to 0; step *i* goes from ``sigmas[i]`` to the next.

    Hashable, so that whatever depends on the schedule alone can be computed once and kept.
    """

    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return len(self.sigmas) - 1


class Scheduler(Protocol):
    """What is used of diffusers' ``FlowMatchEulerDiscreteScheduler``."""

    config: Any
    timesteps: Tensor
    sigmas: Tensor

    def set_timesteps(self, *, sigmas: list[float], mu: float, device: torch.device) -> None:
        """Fix the noise levels."""
        ...

    def set_begin_index(self, begin_index: int) -> None:
        """Say at which level stepping starts."""
        ...

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool
    ) -> tuple[Tensor, ...]:
        """Move the sample one level down."""
        ...


def grid_for(width: int, height: int, multiple: int) -> Grid:
    """The smallest grid that covers ``width`` × ``height`` pixels."""
    return Grid(rows=-(-height // multiple), columns=-(-width // multiple))


def noise(seed: int, channels: int, grid: Grid) -> Tensor:
    """Standard normal latents ``(1, channels, 2·rows, 2·columns)``, float32 on the CPU.

    Drawn from a generator of their own, so they depend on nothing but the arguments. torch's own
    on a CPU looks at 32 bits of a seed; larger seeds are drawn by NumPy's Mersenne Twister, which
    is seeded with all of their bits, and whose numbers stay as they are for good (NEP 19).
    """
    shape = (1, channels, PATCH * grid.rows, PATCH * grid.columns)
    if seed >= _TORCH_SEEDS:
        words = [seed >> shift & 0xFFFFFFFF for shift in range(0, seed.bit_length(), 32)]
        drawn = np.random.RandomState(words).standard_normal(shape)
        return torch.from_numpy(drawn.astype(np.float32))
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def pack(latents: Tensor) -> Tensor:
    """``(B, C, 2h, 2w)`` latents to ``(B, h·w, 4C)`` tokens, row by row."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(img: Tensor, grid: Grid) -> Tensor:
    """``(B, h·w, 4C)`` tokens back to ``(B, C, 2h, 2w)`` latents."""
    batch, _, width = img.shape
    channels = width // (PATCH * PATCH)
    patches = img.view(batch, grid.rows, grid.columns, channels, PATCH, PATCH)
    shape = (batch, channels, PATCH * grid.rows, PATCH * grid.columns)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def image_ids(grid: Grid) -> Tensor:
    """RoPE positions ``(h·w, 3)`` of image tokens: 0, row, column; float32 on the CPU."""
    ids = torch.zeros(grid.rows, grid.columns, 3)
    ids[..., 1] = torch.arange(grid.rows)[:, None]
    ids[..., 2] = torch.arange(grid.columns)[None, :]
    return ids.view(-1, 3)


def shift_mu(tokens: int, config: Any) -> float:
    """How far the schedule is shifted towards noise: linear in the number of image tokens.

    ``config`` is the scheduler's; FLUX.1-dev's line goes from 0.5 at 256 tokens to 1.15 at 4096.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (top - base) / (high - low)
    return float(tokens * slope + (base - slope * low))


def start(scheduler: Scheduler, steps: int, tokens: int, device: torch.device) -> Scheduler:
    """A copy of ``scheduler`` set to the first of ``steps`` steps; the original is not touched.

    A scheduler counts its steps, so each run of a denoising loop needs one of its own.
    """
    fresh = copy.deepcopy(scheduler)
    sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
    fresh.set_timesteps(sigmas=sigmas, mu=shift_mu(tokens, fresh.config), device=device)
    fresh.set_begin_index(0)
    return fresh


def schedule_of(scheduler: Scheduler) -> Schedule:
    """The noise levels of a scheduler that ``start`` returned."""
    return Schedule(tuple(scheduler.sigmas.tolist()))
