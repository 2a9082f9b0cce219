"""From latents to pictures with diffusers' ``AutoencoderKL``, one picture at a time.

Knows the autoencoder's scale and shift; knows no tokens and no transformer.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from redux_pipelines.decoder import Decoder
from redux_pipelines.errors import OutputError

TILE_ABOVE_PIXELS = 1024 * 1024
STRIP_PIXELS = 128 * 1024


class Autoencoder:
    """The decoder half of a FLUX autoencoder on one device.

    A picture of more than ``tile_above_pixels`` pixels is decoded in strips of at most about
    ``STRIP_PIXELS``: the same picture up to rounding, from less memory.
    """

    def __init__(self, vae: Any, *, tile_above_pixels: int = TILE_ABOVE_PIXELS) -> None:
        self._vae = vae
        self._decoder = Decoder(vae)
        self._tile_above_pixels = tile_above_pixels

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
        """RGB pictures of ``latents (B, C, h, w)``, rounded as diffusers' ``VaeImageProcessor``.

        Their number does not matter for memory: each is on its way to the host before the next.
        Raises ``OutputError`` for one that is not finite everywhere: as bytes it would be black.
        """
        config = self._vae.config
        scaled = latents.to(self._vae.dtype) / config.scaling_factor + config.shift_factor
        return [self._picture(each[None]) for each in scaled]

    def _picture(self, latents: Tensor) -> Image.Image:
        strips = self._decoder(latents, self._strips(latents))
        is_finite = torch.stack([strip.isfinite().all() for strip in strips]).all()
        pixels = torch.cat([_rounded(strip[0]) for strip in strips]).cpu().numpy()
        if not is_finite:  # asked once the pixels are here, when there is nothing to wait for
            raise OutputError(
                "the model made numbers that are not finite where a picture was to be: another "
                "seed or --dtype may help; if every picture is like this, its weights are damaged"
            )
        return Image.fromarray(pixels)

    def _strips(self, latents: Tensor) -> int:
        pixels = latents.shape[2] * latents.shape[3] * self.factor**2
        return -(-pixels // STRIP_PIXELS) if pixels > self._tile_above_pixels else 1


def _rounded(decoded: Tensor) -> Tensor:
    """``(3, H, W)`` from -1 to 1 as bytes ``(H, W, 3)``."""
    unit = (decoded * 0.5 + 0.5).clamp(0, 1).float()
    return (unit * 255).round().to(torch.uint8).permute(1, 2, 0)
