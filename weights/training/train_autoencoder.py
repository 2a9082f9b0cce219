"""Trains the autoencoder's f8 core on crops of icons, photographs and textures.

    python -m training.train_autoencoder --minutes 60

Resumes from its checkpoint. Ends with two folders, ``core`` and ``vae`` (grown to f32), both with
the latents' mean and deviation in their configs. Knows nothing of the transformer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from training import autoencoder as ae
from training import cli
from training.augment import compose, plain, random_crops, random_placement
from training.dataset import TRAINING_PHOTOS, Icons, load_icons, load_photos
from training.metrics import psnr
from training.optimizer import MuonAdamW, Rates
from training.precision import autocast
from training.progress import Average, TrainingClock, decay
from training.run import Run
from training.settings import AutoencoderSizes, Cadence, Sizes
from training.textures import random_textures
from training.workplace import Workplace

_GRADIENT_WEIGHT = 0.5
_KL_WEIGHT = 5e-4
_CROP_STAGES = (0.45, 0.8)
_CONSTANT_RATE_UNTIL = 0.4
_CADENCE = Cadence(report_every=50, save_every_s=120.0, look_every_s=120.0)
_RATES = Rates(muon=0.02, adamw=2e-3)


@dataclass(frozen=True)
class Material:
    """What crops are cut from: icons, and photographs ``(H, W, 3)``."""

    icons: Icons
    photos: list[NDArray[np.uint8]]

    @property
    def side(self) -> int:
        """Side of the icons in pixels."""
        return int(self.icons.pixels.shape[1])


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon's share: convolutions between features."""
    return parameter.ndim == 4 and "conv_in" not in name and "conv_out" not in name


def crop_stage(fraction: float, step: int) -> int:
    """Which crops to train.

    The last stage takes turns with the one before: whole pictures alone cost those of half the size
    0.5 dB.
    """
    stage = sum(fraction > start for start in _CROP_STAGES)
    return stage - step % 2 if stage == len(_CROP_STAGES) else stage


def draw_batch(rng: Generator, material: Material, side: int, count: int) -> Tensor:
    """``count`` crops of ``side`` pixels in -1…1: 7 in 10 icons, the rest photos and textures."""
    kinds = rng.multinomial(count, (0.35, 0.35, 0.2, 0.1))
    batch = torch.cat(
        [
            _icon_crops(rng, material.icons, kinds[0], max(side, material.side // 2), side),
            _icon_crops(rng, material.icons, kinds[1], material.side, side),
            random_crops(rng, material.photos, kinds[2], side, side),
            random_textures(rng, kinds[3], side, side),
        ]
    )
    shuffled = torch.from_numpy(rng.random(len(batch)) < 0.3)
    batch[shuffled] = batch[shuffled][:, torch.from_numpy(rng.permutation(3))]
    return batch.contiguous(memory_format=torch.channels_last)


def _icon_crops(rng: Generator, icons: Icons, count: int, canvas: int, side: int) -> Tensor:
    """Of two random crops of each scene the one with more in it."""
    if count == 0:
        return torch.empty(0, 3, side, side)
    rows = np.sort(rng.choice(icons.training_rows, count))
    scenes = compose(icons.pixels[rows], random_placement(rng, count, 0.5), canvas, canvas)
    return torch.stack([_busier_crop(rng, scene, side) for scene in scenes])


def _busier_crop(rng: Generator, scene: Tensor, side: int) -> Tensor:
    room = scene.shape[-1] - side + 1
    corners = rng.integers(room, size=(2, 2)).tolist()
    crops = [scene[:, top : top + side, left : left + side] for top, left in corners]
    return max(crops, key=lambda crop: float(crop.std()))


def losses(core: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss of a batch and its parts: absolute and squared error, error of gradients, KL."""
    with autocast():
        posterior = core.encode(pictures).latent_dist
        restored = core.decode(posterior.sample()).sample
    error = restored.float() - pictures
    mean, variance = posterior.mean.float(), posterior.var.float()
    kl = 0.5 * (mean**2 + variance - 1 - posterior.logvar.float()).mean()
    absolute, squared = error.abs().mean(), (error**2).mean()
    edges = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    loss = absolute + squared + _GRADIENT_WEIGHT * edges + _KL_WEIGHT * kl
    return loss, {"l1": absolute.item(), "mse": squared.item(), "kl": kl.item()}


def held_out_pictures(icons: Icons, side: int, count: int = 48) -> Tensor:
    """Icons of held-out concepts on white, evenly chosen, ``(count, 3, side, side)``."""
    rows = icons.held_out_rows
    rows = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    return compose(icons.pixels[rows], plain(len(rows)), side, side)


def reconstruct(core: AutoencoderKL, pictures: Tensor) -> Tensor:
    """What is left of ``pictures`` after encoding and decoding."""
    return torch.cat([ae.decode(core, ae.encode(core, part)) for part in torch.split(pictures, 8)])


class AutoencoderTraining(Run):
    """One run: the core, its average and its optimizer."""

    def __init__(
        self, sizes: AutoencoderSizes, material: Material, folder: Path, clock: TrainingClock
    ) -> None:
        super().__init__(folder, "autoencoder", clock, _CADENCE)
        torch.manual_seed(0)
        core = ae.build_core(sizes.channels, sizes.groups, sizes.latent_channels)
        self.core: AutoencoderKL = core.to(memory_format=torch.channels_last)
        self.average = Average(self.core, 0.995)
        self.optimizer = MuonAdamW(self.core.named_parameters(), is_matrix, _RATES)
        self._sizes, self._material = sizes, material
        self.keep(core=self.core, average=self.average, optimizer=self.optimizer)

    def train_step(self) -> dict[str, float]:
        """One update; returns the parts of the loss."""
        rng = np.random.default_rng((1, self.step))
        torch.manual_seed(self.step)
        fraction = self.clock.fraction
        side, count = self._sizes.crops[crop_stage(fraction, self.step)]
        loss, parts = losses(self.core, draw_batch(rng, self._material, side, count))
        loss.backward()  # type: ignore[no-untyped-call]
        warmup = min(1.0, (self.step + 1) / 15)
        self.optimizer.step(warmup * decay(fraction, _CONSTANT_RATE_UNTIL))
        ae.keep_pointwise(self.core)
        self.average.update(self.core)
        self.step += 1
        return parts

    def averaged(self) -> AutoencoderKL:
        """A copy of the core with the averaged weights."""
        copy = ae.build_core(
            self._sizes.channels, self._sizes.groups, self._sizes.latent_channels
        ).to(memory_format=torch.channels_last)
        copy.load_state_dict(self.average.weights)
        copy.eval()
        return copy

    def look(self) -> dict[str, float]:
        """PSNR in dB on held-out icons at full size ("1024") and at half of it."""
        core, icons = self.averaged(), self._material.icons
        large = held_out_pictures(icons, self._material.side)
        small = F.avg_pool2d(large, 2)
        return {
            "psnr_large": psnr(large, reconstruct(core, large)),
            "psnr_small": psnr(small, reconstruct(core, small)),
        }


def finish(training: AutoencoderTraining, icons: Icons, core: Path, vae: Path) -> None:
    """Write the averaged core, and its growth to f32, with the latents' statistics."""
    trained = training.averaged()
    rng = np.random.default_rng(0)
    rows = rng.choice(icons.training_rows, 192)
    side = icons.pixels.shape[1] // 2
    scenes = compose(icons.pixels[rows], random_placement(rng, len(rows)), side, side)
    mean, deviation = ae.latent_statistics(trained, scenes)
    trained.register_to_config(scaling_factor=1 / deviation, shift_factor=mean)
    trained.save_pretrained(core)
    ae.grow(trained).save_pretrained(vae)


def train(place: Workplace, sizes: Sizes, clock: TrainingClock) -> None:
    """Train, or finish what was begun, and write ``place.core`` and ``place.vae``."""
    icons = load_icons(place.data, sizes.held_out)
    material = Material(icons, load_photos(place.photos, tuple(TRAINING_PHOTOS)))
    training = AutoencoderTraining(sizes.autoencoder, material, place.autoencoder, clock)
    training.run()
    finish(training, icons, place.core, place.vae)


def main() -> None:
    """Command line."""
    options, _ = cli.parse(cli.parser(__doc__), minutes=60.0)
    train(options.place, options.sizes, options.clock)


if __name__ == "__main__":
    main()
