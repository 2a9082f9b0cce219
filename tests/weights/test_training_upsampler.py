"""Sharpening trains the added decoder levels and nothing else."""

import numpy as np
import torch

from training import autoencoder as ae
from training.cli import make_clock
from training.train_upsampler import UpsamplerTraining, compare, outer_levels


def _drawings():
    pixels = np.zeros((2, 1024, 1024, 4), np.uint8)
    pixels[0, 200:800, 300:700] = 255, 0, 0, 255
    pixels[1, 300:600, 100:900] = 0, 80, 255, 255
    return pixels


def test_only_the_added_levels_change(tmp_path):
    torch.manual_seed(0)
    core = ae.build_core((8, 8, 16, 16), 4, latent_channels=4).eval().requires_grad_(False)
    vae = ae.grow(core)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    training = UpsamplerTraining(core, vae, _drawings(), tmp_path, make_clock(0, 2))
    training.run()
    trained = {id(parameter) for parameter in outer_levels(vae).parameters()}
    for name, parameter in vae.named_parameters():
        if id(parameter) not in trained:
            torch.testing.assert_close(parameter, before[name], atol=0, rtol=0)
    changed = [n for n, p in vae.named_parameters() if not torch.equal(p, before[n])]
    assert any("upsamplers" in name for name in changed)
    again = UpsamplerTraining(core, ae.grow(core), _drawings(), tmp_path, make_clock(0, 2))
    assert again.step == 2
    one, two = compare(core, [vae, again.vae], torch.zeros(1, 3, 256, 256))
    assert one == two
