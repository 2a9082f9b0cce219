"""From latents to pictures with diffusers' ``AutoencoderKL``.

Knows the autoencoder's scale and shift; knows no tokens and no transformer.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor


class Autoencoder:
    """The decoder half of a FLUX autoencoder on one device."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    @property
    def factor(self) -> int:
        """Pixels per latent pixel along each side: 8 for FLUX."""
        return int(2 ** (len(self._vae.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Latent channels: 16 for FLUX."""
        return int(self._vae.config.latent_channels)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """RGB pictures of ``latents (B, C, h, w)``, rounded as diffusers' ``VaeImageProcessor``."""
        config = self._vae.config
        scaled = latents.to(self._vae.dtype) / config.scaling_factor + config.shift_factor
        decoded = self._vae.decode(scaled, return_dict=False)[0]
        unit = (decoded * 0.5 + 0.5).clamp(0, 1).float()
        pixels = (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array) for array in pixels]
