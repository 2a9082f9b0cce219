"""Procedural pictures: smooth colour fields, stripes and checks. Knows no files."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor


def random_textures(rng: Generator, count: int, height: int, width: int) -> Tensor:
    """``count`` patterns ``(count, 3, height, width)`` in -1…1."""
    makers = (_clouds, _waves, _checks)
    drawn = [makers[int(rng.integers(3))](rng, height, width) for _ in range(count)]
    return torch.stack(drawn) if drawn else torch.empty(0, 3, height, width)


def _clouds(rng: Generator, height: int, width: int) -> Tensor:
    """Noise at two scales, each blown up smoothly."""
    picture = torch.zeros(3, height, width)
    for strength in (1.0, float(rng.uniform(0, 0.7))):
        cells = int(rng.integers(2, 17))
        noise = torch.from_numpy(rng.uniform(-1, 1, (1, 3, cells, cells)).astype(np.float32))
        picture += strength * F.interpolate(noise, (height, width), mode="bicubic")[0]
    return picture.clamp(-1, 1)


def _waves(rng: Generator, height: int, width: int) -> Tensor:
    """Two colours mixed by a sine, soft or hard."""
    frequency, hardness = rng.uniform(0.03, 0.8), rng.uniform(1, 8)
    phase = _across(rng, height, width) * frequency + rng.uniform(0, 6.3)
    return _mix(rng, torch.tanh(torch.sin(phase) * hardness) * 0.5 + 0.5)


def _checks(rng: Generator, height: int, width: int) -> Tensor:
    """A checkerboard in a random direction."""
    size = rng.uniform(4, 32)
    squares = (_across(rng, height, width) / size).floor() + (
        _across(rng, height, width) / size
    ).floor()
    return _mix(rng, squares % 2)


def _across(rng: Generator, height: int, width: int) -> Tensor:
    """Distance in pixels along a random direction, ``(height, width)``."""
    angle = rng.uniform(0, np.pi)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return rows * float(np.sin(angle)) + columns * float(np.cos(angle))


def _mix(rng: Generator, weight: Tensor) -> Tensor:
    """Two random colours, by a weight 0…1 of shape ``(height, width)``."""
    colours = torch.from_numpy(rng.uniform(-1, 1, (2, 3, 1, 1)).astype(np.float32))
    return colours[0] * weight + colours[1] * (1 - weight)
