"""Previews: what latents will look like, by a linear map of their channels to colours.

A pixel of a preview is a latent pixel. Good enough to see a picture form, and thousands of times
cheaper than decoding. The map belongs to an autoencoder: its ``preview.json`` (how that of ``mini``
was fitted is in ``training.preview``), or for FLUX.1's the published one. Knows no steps.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from redux_pipelines import sampling
from redux_pipelines.errors import WeightsError
from redux_pipelines.sampling import Grid

FILE = "preview.json"
MAX_SIDE = 256
# ComfyUI, comfy/latent_formats.py, class Flux: latent_rgb_factors and latent_rgb_factors_bias.
_FLUX_FACTORS = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
_FLUX_BIAS = (-0.0329, -0.0718, -0.0851)
_OF_FLUX = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}


@dataclass(frozen=True, slots=True)
class LatentColours:
    """``factors (C, 3)`` and ``bias (3,)``: latents as they are denoised, to RGB in -1…1."""

    factors: Tensor
    bias: Tensor

    @torch.inference_mode()
    def picture(self, img: Tensor, velocity: Tensor, sigma: Tensor, grid: Grid) -> Image.Image:
        """What becomes of latent tokens ``img (1, L, 4C)`` at noise level ``sigma``.

        FLUX's latents are (1 - σ) image + σ noise and its ``velocity``, of the step just done, is
        noise - image. So the image is about img - σ velocity, long before the noise is gone.
        Waits for the device. At most ``MAX_SIDE`` pixels a side.
        """
        clean = sampling.unpack(img.float() - sigma * velocity.float(), grid)[0]
        rgb = torch.einsum("chw,cx->hwx", clean, self.factors) + self.bias
        levels = ((rgb * 0.5 + 0.5).nan_to_num(0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        picture = Image.fromarray(levels.cpu().numpy())
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
        return picture


def latent_colours(
    folder: Path, config: Mapping[str, Any], device: torch.device
) -> LatentColours | None:
    """The map of the autoencoder with ``config`` in ``folder``; None where none is known.

    Raises:
        WeightsError: it has one that is damaged.
    """
    path = folder / FILE
    if path.is_file():
        return _read(path, int(config["latent_channels"]), device)
    sizes = config["latent_channels"], len(config["block_out_channels"])
    is_flux = sizes == (16, 4) and all(config[name] == _OF_FLUX[name] for name in _OF_FLUX)
    return _colours(_FLUX_FACTORS, _FLUX_BIAS, device) if is_flux else None


def _read(path: Path, channels: int, device: torch.device) -> LatentColours:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        found = _colours(given["factors"], given["bias"], device)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is no map of latents to colours: {error}") from error
    if found.factors.shape != (channels, 3) or found.bias.shape != (3,):
        raise WeightsError(f"{path} must have {channels} rows of 3 factors, and a bias of 3")
    return found


def _colours(
    factors: Sequence[Sequence[float]], bias: Sequence[float], device: torch.device
) -> LatentColours:
    both = (torch.tensor(each, dtype=torch.float32, device=device) for each in (factors, bias))
    return LatentColours(*both)
