"""Sharpens the grown autoencoder: trains its outer decoder levels on drawings of 1024 pixels.

    python -m training.train_upsampler --minutes 10

The encoder and the core's levels stay as they are, so the latents, and whatever was trained on
them, stay valid. Resumes from its checkpoint and rewrites the ``vae`` folder at the end.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn

from training import autoencoder as ae
from training import cli
from training.augment import compose, random_placement
from training.dataset import load_large
from training.metrics import psnr
from training.optimizer import MuonAdamW, Rates
from training.precision import autocast
from training.progress import TrainingClock, decay
from training.run import Run
from training.settings import Cadence
from training.workplace import Workplace

SCALE = 2**ae.OUTER_LEVELS
_WINDOW = 512
_BATCH = 2
_NOISE = 0.05
"""Noise on the latents, in their deviations: denoised latents are never perfect."""
_GRADIENT_WEIGHT = 1.0
_RATES = Rates(muon=0.01, adamw=1e-3)
_CADENCE = Cadence(report_every=20, save_every_s=120.0)


def outer_levels(vae: AutoencoderKL) -> nn.ModuleList:
    """What growth added to the decoder, and the layers behind it."""
    decoder: Any = vae.decoder
    first = len(decoder.up_blocks) - ae.OUTER_LEVELS
    upsampler = decoder.up_blocks[first - 1].upsamplers
    return nn.ModuleList(
        [upsampler, *decoder.up_blocks[first:], decoder.conv_norm_out, decoder.conv_out]
    )


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon's share: the square convolutions."""
    return parameter.ndim == 4 and parameter.shape[0] == parameter.shape[1]


class UpsamplerTraining(Run):
    """One run over ``drawings (N, S, S, 4)``, premultiplied RGBA of 1024 pixels."""

    def __init__(
        self,
        core: AutoencoderKL,
        vae: AutoencoderKL,
        drawings: NDArray[np.uint8],
        folder: Path,
        clock: TrainingClock,
    ) -> None:
        super().__init__(folder, "upsampler", clock, _CADENCE)
        self.vae: Any = vae.requires_grad_(False).to(memory_format=torch.channels_last)
        self._core, self._drawings = core, drawings
        self._levels = outer_levels(vae).requires_grad_(True)
        self._optimizer = MuonAdamW(self._levels.named_parameters(), is_matrix, _RATES)
        self.keep(levels=self._levels, optimizer=self._optimizer)

    def train_step(self) -> dict[str, float]:
        """One update."""
        rng = np.random.default_rng((3, self.step))
        torch.manual_seed(self.step)
        loss = self._loss(self._windows(rng))
        loss.backward()  # type: ignore[no-untyped-call]
        warmup = min(1.0, (self.step + 1) / 15)
        self._optimizer.step(warmup * decay(self.clock.fraction, 0.4))
        self.step += 1
        return {"loss": loss.item()}

    def _loss(self, pictures: Tensor) -> Tensor:
        latents = ae.encode(self._core, F.avg_pool2d(pictures, SCALE))
        noisy = latents + _NOISE * latents.std() * torch.randn_like(latents)
        with autocast():
            made: Tensor = self.vae.decode(
                noisy.contiguous(memory_format=torch.channels_last)
            ).sample
        error = made.float() - pictures
        edges = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
        loss: Tensor = error.abs().mean() + (error**2).mean() + _GRADIENT_WEIGHT * edges
        return loss

    def _windows(self, rng: Generator) -> Tensor:
        """Whole scenes of 512 pixels, or windows of that size in scenes of 1024."""
        rows = rng.integers(len(self._drawings), size=_BATCH)
        canvas = int(rng.choice([_WINDOW, 2 * _WINDOW]))
        scenes = compose(self._drawings[rows], random_placement(rng, _BATCH), canvas, canvas)
        top, left = (int(value) for value in rng.integers(canvas - _WINDOW + 1, size=2))
        return scenes[..., top : top + _WINDOW, left : left + _WINDOW]


def compare(core: AutoencoderKL, vaes: list[AutoencoderKL], pictures: Tensor) -> list[float]:
    """PSNR in dB of each autoencoder's decoding of the core's latents, against ``pictures``."""
    latents = ae.encode(core, F.avg_pool2d(pictures, SCALE))
    return [psnr(pictures, ae.decode(vae, latents)) for vae in vaes]


def train(place: Workplace, clock: TrainingClock) -> None:
    """Train on ``place``'s large drawings and rewrite ``place.vae``."""
    core = ae.load(place.core)
    drawings, held_out = load_large(place.data / "large")
    vae = ae.grow(AutoencoderKL.from_pretrained(place.core))
    training = UpsamplerTraining(core, vae, drawings, place.autoencoder, clock)
    training.run()
    training.vae.save_pretrained(place.vae)
    rng = np.random.default_rng(0)
    scenes = compose(held_out[:12], random_placement(rng, len(held_out[:12]), 1.0), 512, 512)
    plain, sharp = compare(core, [ae.grow(core), training.vae], scenes)
    training.journal.write("held_out", grown=plain, trained=sharp)


def main() -> None:
    """Command line."""
    options, _ = cli.parse(cli.parser(__doc__), minutes=10.0)
    train(options.place, options.clock)


if __name__ == "__main__":
    main()
