"""Growing the core changes nothing but the scale; latents come out with unit variance."""

import pytest
import torch
import torch.nn.functional as F

from training import autoencoder as ae
from training.train import take_autoencoder
from training.workplace import Workplace

CHANNELS, GROUPS = (8, 8, 16, 16), 4


@pytest.fixture(scope="module")
def core():
    """A core whose residual branches do something, as after training."""
    torch.manual_seed(0)
    made = ae.build_core(CHANNELS, GROUPS, latent_channels=4)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("conv2.weight"):
                parameter.normal_(0, 0.1)
    ae.keep_pointwise(made)
    return made.eval()


@pytest.fixture(scope="module")
def grown(core):
    return ae.grow(core)


@torch.no_grad()
def test_1024_pixels_in_the_grown_model_are_256_in_the_core(core, grown):
    large = torch.rand(1, 3, 1024, 1024) * 2 - 1
    expected = core.encode(F.avg_pool2d(large, 4)).latent_dist.mode()
    error = (grown.encode(large).latent_dist.mode() - expected).norm() / expected.norm()
    assert error < 3e-3


@torch.no_grad()
def test_the_grown_model_decodes_a_larger_version_of_the_same_picture(core, grown):
    latents = F.interpolate(torch.randn(1, 4, 4, 4), 16, mode="bicubic")
    small, large = core.decode(latents).sample, grown.decode(latents).sample
    assert large.shape == (1, 3, 512, 512)
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))  # the border is padded
    error = (F.avg_pool2d(large, 4) - small)[inner].norm() / small[inner].norm()
    assert error < 0.15


def test_shrinking_undoes_growth(core, grown):
    shrunk = ae.shrink(grown)
    assert tuple(shrunk.config.block_out_channels) == CHANNELS
    for name, value in core.state_dict().items():
        assert torch.equal(shrunk.state_dict()[name], value), name


def test_a_finished_autoencoder_can_stand_in_for_training_one(core, grown, tmp_path):
    grown.to(torch.bfloat16).save_pretrained(tmp_path / "finished")
    grown.float()
    place = Workplace(tmp_path / "work")
    take_autoencoder(place, tmp_path / "finished")
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = core.encode(picture).latent_dist.mode()
        taken = ae.load(place.core).encode(picture).latent_dist.mode()
    assert (taken - expected).norm() / expected.norm() < 0.02  # bfloat16's rounding
    assert ae.load(place.vae).config.block_out_channels[-1] == CHANNELS[-1]


def test_growth_keeps_the_latents_statistics(core):
    core.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    config = ae.grow(core).config
    assert (config.scaling_factor, config.shift_factor) == (0.5, 0.25)


def test_the_core_starts_pointwise_at_its_ends_and_stays_so(core):
    fresh = ae.build_core(CHANNELS, GROUPS)
    for conv in (fresh.encoder.conv_in, fresh.decoder.conv_out, core.encoder.conv_in):
        off_centre = conv.weight.clone()
        off_centre[:, :, 1, 1] = 0
        assert off_centre.abs().max() == 0


def test_latent_statistics_are_those_of_all_latents(core):
    pictures = torch.rand(20, 3, 32, 32) * 2 - 1
    latents = ae.encode(core, pictures)
    mean, deviation = ae.latent_statistics(core, pictures)
    assert mean == pytest.approx(float(latents.mean()), abs=1e-2)
    assert deviation == pytest.approx(float(latents.std()), rel=1e-2)


def test_a_saved_autoencoder_is_the_same_after_loading(core, tmp_path):
    core.save_pretrained(tmp_path)
    pictures = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = core.encode(pictures).latent_dist.mode()
        loaded = ae.load(tmp_path).encode(pictures).latent_dist.mode()
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=1e-5)
