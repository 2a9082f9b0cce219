"""Pictures against diffusers' VaeImageProcessor, strips against whole ones, and their memory."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch import nn

from live_bytes import LiveBytes
from redux_kernels import dispatch, group_norm_silu, reference
from redux_pipelines import autoencoder as autoencoder_module
from redux_pipelines.autoencoder import KERNELS, Autoencoder, Decoder

MINI = Path(__file__).resolve().parents[2] / "weights/mini/base/vae"
RELATIVE = 1e-5
GREY_LEVEL = 2 / 255  # of pictures from -1 to 1


def pictures_of_diffusers(vae, latents):
    with torch.no_grad():
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(scaled, return_dict=False)[0]
    return VaeImageProcessor().postprocess(decoded)


def test_decoding_rounds_as_diffusers_does(pipeline, difference):
    autoencoder = pipeline._components.autoencoder
    latents = torch.randn(2, autoencoder.channels, 4, 6)
    ours = autoencoder.decode(latents)
    assert [image.size for image in ours] == [(192, 128)] * 2
    wanted = pictures_of_diffusers(autoencoder._vae, latents)
    assert max(map(difference, ours, wanted)) <= 1
    assert ours[0].tobytes() == autoencoder.decode(latents[:1])[0].tobytes()


def test_pictures_above_a_size_are_decoded_in_strips(pipeline, difference, monkeypatch):
    vae = pipeline._components.autoencoder._vae
    latents = torch.randn(1, 4, 4, 6)  # 192 × 128 pixels
    asked = []
    decode = autoencoder_module.Decoder.__call__

    def spy(self, latents, strips):
        asked.append(strips)
        return decode(self, latents, strips)

    monkeypatch.setattr(autoencoder_module.Decoder, "__call__", spy)
    monkeypatch.setattr(autoencoder_module, "STRIP_PIXELS", 192 * 40)
    (whole,) = Autoencoder(vae, tile_above_pixels=192 * 128).decode(latents)
    (cut,) = Autoencoder(vae, tile_above_pixels=192 * 128 - 1).decode(latents)
    assert asked == [1, 4]
    assert difference(whole, cut) <= 1
    assert difference(cut, *pictures_of_diffusers(vae, latents)) <= 1


def test_factor_and_channels_come_from_the_config(pipeline):
    autoencoder = pipeline._components.autoencoder
    assert (autoencoder.factor, autoencoder.channels) == (32, 4)


# --- the decoder, whole and in strips -------------------------------------------------------------


def flux_like(channels=(16, 32, 64, 64), groups=8, dtype=torch.float32, **config):
    """FLUX's autoencoder with fewer channels; norms that do not leave their input alone."""
    levels = len(channels)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        latent_channels=16,
        norm_num_groups=groups,
        **{"layers_per_block": 2, "use_quant_conv": False, "use_post_quant_conv": False, **config},
    )
    for module in vae.decoder.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.5)
    return nn.Module.to(vae, dtype).eval().requires_grad_(False)  # diffusers' own warns


def diffusers_decode(vae, latents):
    return vae.decode(latents, return_dict=False)[0]


def ours(vae, latents, strips=1):
    return torch.cat(Decoder(vae)(latents, strips), dim=2)


def error(got, want):
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(scope="module")
def flux_vae():
    return flux_like()


@pytest.fixture(scope="module")
def mini_vae():
    return AutoencoderKL.from_pretrained(MINI).eval().requires_grad_(False)


@pytest.mark.parametrize("strips", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("name", ["flux_vae", "mini_vae"])
@torch.inference_mode()
def test_strips_are_the_whole_picture(name, strips, request):
    vae = request.getfixturevalue(name)
    latents = torch.randn(1, 16, 8, 5)
    want = diffusers_decode(vae, latents)
    got = ours(vae, latents, strips)
    assert error(got, want) <= RELATIVE
    assert (got - want).abs().max() <= GREY_LEVEL / 100


@pytest.mark.parametrize("strips", [1, 4])
@torch.inference_mode()
def test_statistics_stay_exact_over_many_pixels(mini_vae, strips):
    """torch's own GroupNorm in channels_last is off by 7e-5 here: it sums in float32, in order."""
    latents = torch.randn(1, 16, 16, 16)
    contiguous = AutoencoderKL.from_pretrained(MINI).eval()
    want = diffusers_decode(contiguous, latents)
    assert error(ours(mini_vae, latents, strips), want) <= RELATIVE


@pytest.mark.parametrize(
    "config",
    [
        {"use_post_quant_conv": True},
        {"mid_block_add_attention": False},
        {"layers_per_block": 1, "channels": (24, 48), "groups": 6},
    ],
    ids=["post-quant", "no-attention", "odd-channels"],
)
@torch.inference_mode()
def test_other_autoencoders_are_decoded_too(config):
    vae, latents = flux_like(**config), torch.randn(1, 16, 6, 4)
    assert error(ours(vae, latents, 3), diffusers_decode(vae, latents)) <= RELATIVE


@torch.inference_mode()
def test_half_precision_is_as_near_to_float32_as_diffusers(flux_vae):
    latents = torch.randn(1, 16, 8, 8)
    want = diffusers_decode(flux_vae, latents)
    half = flux_like(dtype=torch.bfloat16)
    theirs = error(diffusers_decode(half, latents.bfloat16()).float(), want)
    for strips in (1, 4):
        assert error(ours(half, latents.bfloat16(), strips).float(), want) <= 1.1 * theirs


@torch.inference_mode()
def test_latents_are_left_alone_and_weights_are_not_copied(flux_vae):
    latents = torch.randn(1, 16, 4, 4)
    before = latents.clone()
    decoder = Decoder(flux_vae)
    decoder(latents, 2)
    assert torch.equal(latents, before)
    assert decoder._decoder is flux_vae.decoder


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="act_fn='relu'"):
        Decoder(flux_like(channels=(16, 16), act_fn="relu"))


# --- which kernels it may run ---------------------------------------------------------------------


class Launches:
    """Stands for the GPU's kernels on a CPU: their references, wrong where ``spoil`` says so."""

    def __init__(self):
        self.widths = []
        self.spoil = {}

    def statistics(self, x, groups):
        self.widths.append(("group_norm_statistics", x.shape[-1]))
        mean, var = reference.group_norm_statistics(x, groups)
        return mean, var * self.spoil.get(self.widths[-1], 1.0)

    def silu(self, x, *rest):
        self.widths.append(("group_norm_silu", x.shape[-1]))
        y = reference.group_norm_silu(x, *rest)
        y[:, -1] *= self.spoil.get(self.widths[-1], 1.0)
        return y


@pytest.fixture
def launches(monkeypatch):
    """The CPU passes for a GPU that nothing was tested on yet."""
    made = Launches()
    monkeypatch.setattr(dispatch, "_tested", {})
    monkeypatch.setattr(dispatch, "hardware_refusal", lambda operator, device: None)
    monkeypatch.setattr(
        dispatch,
        "runs_kernel",
        lambda operator, x: dispatch._tested.get((operator, x.device), "untested") is None,
    )
    monkeypatch.setattr(group_norm_silu, "launch_statistics", made.statistics)
    monkeypatch.setattr(group_norm_silu, "launch", made.silu)
    return made


@torch.inference_mode()
def test_kernels_are_tested_at_every_width_when_a_decoder_is_made_and_then_run(launches, flux_vae):
    latents = torch.randn(1, 16, 4, 4)
    want = diffusers_decode(flux_vae, latents)
    decoder = Decoder(flux_vae)
    assert set(launches.widths) == {(name, width) for name in KERNELS for width in (16, 32, 64)}
    launches.widths.clear()
    assert error(torch.cat(decoder(latents, 2), dim=2), want) <= RELATIVE
    assert {name for name, _ in launches.widths} == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("wrong", [1.05, float("nan")])
@pytest.mark.parametrize("width", [16, 32, 64])
@torch.inference_mode()
def test_kernel_that_is_wrong_at_one_width_is_left_to_torch(
    launches, flux_vae, name, width, wrong, caplog
):
    launches.spoil[name, width] = wrong
    latents = torch.randn(1, 16, 4, 4)
    with caplog.at_level("DEBUG", logger="redux_pipelines.autoencoder"):
        decoder = Decoder(flux_vae)
    assert f"kernel {name} is not used for {width} channels: differs from its" in caplog.text
    launches.widths.clear()
    assert error(torch.cat(decoder(latents, 2), dim=2), diffusers_decode(flux_vae, latents)) < 1e-5
    assert not launches.widths


def test_verdict_of_another_model_does_not_count(launches, flux_vae):
    """The transformer's self-test passed at its own width, before the decoder was loaded."""
    for name in KERNELS:
        dispatch.record(name, torch.device("cpu"), None)
    launches.spoil["group_norm_silu", 64] = 1.05
    Decoder(flux_vae)
    assert "differs" in dispatch.refusal("group_norm_silu", "cpu")


# --- why not tiles, and what strips save ----------------------------------------------------------


@pytest.mark.parametrize("name", ["flux_vae", "mini_vae"])
@torch.inference_mode()
def test_tiles_that_are_decoded_alone_give_another_picture(name, request):
    """diffusers' tiling: each tile is normed by its own statistics. Strips are not."""
    vae = request.getfixturevalue(name)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.randn(1, 16, 12, 12) * torch.linspace(0.5, 2, 12)
    want = diffusers_decode(vae, latents)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 8 * factor
    tiled = diffusers_decode(vae, latents)
    vae.disable_tiling()
    assert (tiled - want).abs().max() > 5 * GREY_LEVEL
    assert (ours(vae, latents, 3) - want).abs().max() < GREY_LEVEL / 100


def peak_of(function, *args):
    with LiveBytes() as live:
        function(*args)
    return live.peak


@torch.inference_mode()
def test_strips_hold_less_than_the_whole():
    """``largest`` is the activation after the last upsampling: it and the next one are needed."""
    vae, latents = flux_like(), torch.randn(1, 16, 32, 32)
    largest = 32 * 256 * 256 * 4
    theirs = peak_of(diffusers_decode, vae, latents)
    decoder = Decoder(vae)
    whole, four, eight = (peak_of(decoder, latents, strips) for strips in (1, 4, 8))
    assert eight < four < whole <= 2.6 * largest < theirs
    assert eight <= 1.95 * largest


@torch.inference_mode()
def test_flux_needs_little_more_than_one_and_a_half_activations_at_1536():
    """In its own size, on tensors without memory: 1.9 GiB in bfloat16 where diffusers needs 3.4.

    An upper bound: on the meta device convolutions forget channels_last, and strips are copied.
    """
    side, largest = 1536, 1152 * 2**20  # 256 channels
    with torch.device("meta"):
        vae = flux_like((128, 256, 512, 512), 32, dtype=torch.bfloat16)
        latents = torch.empty(1, 16, side // 8, side // 8, dtype=torch.bfloat16)
        strips = Autoencoder(vae)._strips(latents)
        assert strips == 18
        assert peak_of(Decoder(vae), latents, strips) <= 1.7 * largest
        assert peak_of(diffusers_decode, vae, latents) >= 3 * largest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("strips", [1, 5])
@torch.inference_mode()
def test_picture_on_a_gpu_is_the_one_on_a_cpu(flux_vae, strips, monkeypatch):
    latents = torch.randn(1, 16, 16, 12)
    want = diffusers_decode(flux_vae, latents)
    vae = flux_like().cuda()
    monkeypatch.setattr(dispatch, "_tested", {})  # whatever tests before this one did
    Decoder(vae)
    assert [dispatch.refusal(name, "cuda") for name in KERNELS] == [None, None]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    got = ours(vae, latents.cuda(), strips)
    assert error(got.cpu(), want) <= 1e-4
    first = vae.decoder.conv_in(latents.cuda().contiguous(memory_format=torch.channels_last))
    assert first.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@torch.inference_mode()
def test_strips_lower_the_peak_on_a_gpu():
    vae = flux_like((128, 256, 512, 512), 32, dtype=torch.bfloat16).cuda()
    latents = torch.randn(1, 16, 128, 128, device="cuda", dtype=torch.bfloat16)
    decoder, peaks = Decoder(vae), []
    for strips in (1, 8):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        decoder(latents, strips)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.75 * peaks[0]
