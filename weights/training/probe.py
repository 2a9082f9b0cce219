"""A quick look at a model in training: samples of held-out icons, and what they are nearest to.

Runs the raw modules in batches; the thorough measurement through the product is ``evaluate``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from redux_pipelines.sampling import Grid
from training import autoencoder as ae
from training import flow
from training.augment import compose, plain
from training.dataset import Icons
from training.flow import Conditions
from training.model import MiniModel
from training.precision import autocast

_STEPS = 14
_THUMBNAIL = 32


class Gallery:
    """All icons as thumbnails on white, to find the nearest to a picture."""

    def __init__(self, icons: Icons) -> None:
        parts = np.array_split(np.arange(len(icons.pixels)), max(1, len(icons.pixels) // 200))
        self._concepts = icons.concepts
        self._thumbnails = torch.cat(
            [
                compose(icons.pixels[rows], plain(len(rows)), _THUMBNAIL, _THUMBNAIL).flatten(1)
                for rows in parts
            ]
        )

    def nearest(self, pictures: Tensor) -> NDArray[np.int64]:
        """The concept of the icon with the closest pixels, for each of ``(B, 3, H, W)``."""
        small = F.adaptive_avg_pool2d(pictures, _THUMBNAIL).flatten(1)
        found: NDArray[np.int64] = self._concepts[torch.cdist(small, self._thumbnails).argmin(1)]
        return found


class Probe:
    """Samples variations of ``count`` held-out and as many trained icons."""

    def __init__(self, icons: Icons, core: AutoencoderKL, input_side: int, count: int = 16) -> None:
        rng = np.random.default_rng(3)
        self._rows = {
            "held_out": rng.choice(icons.held_out_rows, count, replace=False),
            "trained": rng.choice(icons.training_rows, count, replace=False),
        }
        self._icons, self._core, self._side = icons, core, input_side
        self._gallery = Gallery(icons)

    def look(self, model: MiniModel, sheet: Path, grids: Sequence[Grid]) -> dict[str, float]:
        """Top-1 retrieval of variations of those shapes' middles; writes a contact sheet.

        Trained icons are shown in the first shape only.
        """
        found, strips = {}, []
        for name, grid in [("trained", grids[0]), *(("held_out", grid) for grid in grids)]:
            rows = self._rows[name]
            inputs = compose(self._icons.pixels[rows], plain(len(rows)), self._side, self._side)
            made = _middle(self._variations(model, inputs, grid))
            hits = self._gallery.nearest(made) == self._icons.concepts[rows]
            found[f"top1_{name}_{grid.rows}x{grid.columns}"] = float(hits.mean())
            strips += [inputs, F.interpolate(made, self._side, mode="area")]
        save_sheet(strips, sheet)
        return found

    @torch.no_grad()
    def _variations(self, model: MiniModel, inputs: Tensor, grid: Grid) -> Tensor:
        sizes = model.sizes
        with autocast():
            redux = model.encode_pictures(inputs)[1].float()
        silence = torch.zeros(len(inputs), sizes.text_tokens, sizes.text_width)
        given = Conditions(
            torch.cat([silence, redux], 1), torch.zeros(len(inputs), sizes.pooled_width)
        )
        latents = flow.sample(model, given, grid, steps=_STEPS)
        config = self._core.config
        return ae.decode(self._core, latents / config.scaling_factor + config.shift_factor)


def _middle(pictures: Tensor) -> Tensor:
    """The largest square of ``(B, 3, H, W)``."""
    height, width = pictures.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pictures[..., top : top + side, left : left + side]


def save_sheet(strips: list[Tensor], path: Path) -> None:
    """Write rows of equally sized pictures ``(B, 3, H, W)`` in -1…1 as one PNG."""
    rows = [torch.cat(list(strip), dim=2) for strip in strips]
    sheet = ((torch.cat(rows, dim=1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)
