"""Puts premultiplied RGBA pictures on plain backgrounds with a flip, scale, shift and rotation.

The same placement can be drawn at any size and, slightly changed, a second time, so that a model's
input and target show the same scene. Knows no files and no models.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Placement:
    """How B pictures lie on their canvases.

    ``background (B, 3)`` 0…1; ``flip (B,)`` ±1, -1 mirrors; ``scale (B,)`` of the canvas's shorter
    side; ``shift_x``, ``shift_y`` in half shorter sides; ``rotation`` in radians.
    """

    background: Tensor
    flip: Tensor
    scale: Tensor
    shift_x: Tensor
    shift_y: Tensor
    rotation: Tensor

    def __getitem__(self, index: slice | Tensor) -> "Placement":
        """The placements of some of the pictures."""
        return Placement(*(getattr(self, field.name)[index] for field in fields(self)))


def plain(count: int) -> Placement:
    """White, upright, as large as the canvas."""
    zeros = torch.zeros(count)
    return Placement(torch.ones(count, 3), zeros + 1, zeros + 1, zeros, zeros, zeros)


def uniform(rng: Generator, count: int, low: float, high: float) -> Tensor:
    """``count`` random numbers between ``low`` and ``high``, float32."""
    return torch.from_numpy(rng.uniform(low, high, count).astype(np.float32))


def random_placement(rng: Generator, count: int, white: float = 0.6) -> Placement:
    """Scenes as in training targets: ``white`` of the backgrounds are, 3/4 to full size."""
    colours = torch.from_numpy(rng.random((count, 3), dtype=np.float32))
    is_white = torch.from_numpy(rng.random(count) < white)
    scale = uniform(rng, count, 0.75, 1.0)
    full = torch.from_numpy(rng.random(count) < 1 / 3)
    scale = torch.where(full, torch.ones(count), scale)
    return Placement(
        background=torch.where(is_white[:, None], torch.ones(count, 3), colours),
        flip=torch.from_numpy(np.where(rng.random(count) < 0.5, -1.0, 1.0).astype(np.float32)),
        scale=scale,
        shift_x=uniform(rng, count, -1, 1) * (1 - scale),
        shift_y=uniform(rng, count, -1, 1) * (1 - scale),
        rotation=torch.zeros(count),
    )


def jitter(placement: Placement, rng: Generator, amount: float) -> Placement:
    """Nearly the same scene; ``amount`` 1 is ±10 % scale, ±6 % shift, ±0.15 rad."""
    count = len(placement.scale)
    return Placement(
        background=placement.background,
        flip=placement.flip,
        scale=placement.scale * (1 + amount * uniform(rng, count, -0.1, 0.1)),
        shift_x=placement.shift_x + amount * uniform(rng, count, -0.06, 0.06),
        shift_y=placement.shift_y + amount * uniform(rng, count, -0.06, 0.06),
        rotation=placement.rotation + amount * uniform(rng, count, -0.15, 0.15),
    )


def compose(icons: NDArray[np.uint8], place: Placement, height: int, width: int) -> Tensor:
    """RGB scenes ``(B, 3, height, width)`` in -1…1 of premultiplied ``icons (B, S, S, 4)``."""
    empty = (place.background * 2 - 1)[:, :, None, None].expand(-1, -1, height, width)
    return overlay(icons, place, empty)


def overlay(icons: NDArray[np.uint8], place: Placement, scenes: Tensor) -> Tensor:
    """``icons`` drawn over ``scenes (B, 3, height, width)``; the placement's colours are unused."""
    if len(scenes) == 0:
        return scenes
    height, width = scenes.shape[-2:]
    shorter = min(height, width)
    pixels = torch.from_numpy(np.array(icons)).permute(0, 3, 1, 2).float() / 255
    if pixels.shape[-1] >= 2 * shorter:  # grid_sample reads 2 × 2 pixels: avoid aliasing
        pixels = F.avg_pool2d(pixels, pixels.shape[-1] // shorter)
    theta = _inverse_affine(place, height / shorter, width / shorter)
    grid = F.affine_grid(theta, [len(pixels), 4, height, width], align_corners=False)
    drawn = F.grid_sample(pixels, grid, align_corners=False)
    colour, alpha = drawn[:, :3], drawn[:, 3:]
    return colour * 2 - alpha + (1 - alpha) * scenes


def _inverse_affine(place: Placement, height: float, width: float) -> Tensor:
    """Canvas to picture coordinates, ``(B, 2, 3)``; the canvas's shorter side is 1 long."""
    cos = torch.cos(place.rotation) / place.scale
    sin = torch.sin(place.rotation) / place.scale
    x, y = place.shift_x, place.shift_y
    across = torch.stack([cos * width, -sin * height, y * sin - x * cos], 1) * place.flip[:, None]
    down = torch.stack([sin * width, cos * height, -x * sin - y * cos], 1)
    return torch.stack([across, down], 1)


def random_crops(
    rng: Generator, photos: list[NDArray[np.uint8]], count: int, height: int, width: int
) -> Tensor:
    """Crops of RGB ``photos (H, W, 3)`` of all scales, mirrored half the time, in -1…1."""
    crops = [_crop(rng, photos, height, width) for _ in range(count)]
    return torch.stack(crops) if crops else torch.empty(0, 3, height, width)


def _crop(rng: Generator, photos: list[NDArray[np.uint8]], height: int, width: int) -> Tensor:
    photo = photos[int(rng.integers(len(photos)))]
    largest = min(photo.shape[0] / height, photo.shape[1] / width)
    zoom = float(np.exp(rng.uniform(min(0.0, np.log(largest)), np.log(largest))))
    rows, columns = int(height * zoom), int(width * zoom)
    top = int(rng.integers(photo.shape[0] - rows + 1))
    left = int(rng.integers(photo.shape[1] - columns + 1))
    window = photo[top : top + rows, left : left + columns]
    if rng.random() < 0.5:
        window = window[:, ::-1]
    pixels = torch.from_numpy(window.copy()).permute(2, 0, 1)[None].float()
    sized = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return sized[0] / 127.5 - 1
