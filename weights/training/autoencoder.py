"""The mini model's autoencoder: a small f8 core that is trained, and its growth to f32.

Both are diffusers' ``AutoencoderKL``. The grown one has two more levels on either side that do
nothing but average on the way down and upsample smoothly on the way up: a picture of 1024 pixels
encoded by the f32 model equals its 256-pixel version encoded by the core. For that the core's
outermost convolutions are kept pointwise. Knows no data.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.precision import autocast

OUTER_LEVELS = 2
"""Levels that growth adds: f8 becomes f32."""

_LOG_VARIANCE_START = -4.0
_BINOMIAL = torch.tensor([0.25, 0.5, 0.25])


def build_core(channels: tuple[int, ...], groups: int, latent_channels: int = 16) -> AutoencoderKL:
    """A fresh core: one residual block per level, no attention, ``channels`` from the outside in.

    Its skip path starts as a well conditioned linear map and its residual branches at zero, which
    saves the first minutes of training. Torch's global generator is used.
    """
    core = _autoencoder(channels, groups, latent_channels)
    for name, module in core.named_modules():
        if isinstance(module, nn.Conv2d):
            _initialize(name, module)
    _quieten_latents(core.encoder.conv_out)
    keep_pointwise(core)
    return core


def _autoencoder(channels: tuple[int, ...], groups: int, latent_channels: int) -> AutoencoderKL:
    levels = len(channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=groups,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=1024,
    )


def _initialize(name: str, conv: nn.Conv2d) -> None:
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    if name.endswith("conv2"):
        nn.init.zeros_(conv.weight)
    elif name == "encoder.conv_in":
        _fill_centre(conv)
    elif "conv_shortcut" in name or name == "decoder.conv_in":
        nn.init.orthogonal_(conv.weight)
    elif "upsamplers" in name:
        nn.init.dirac_(conv.weight)
    elif "downsamplers" in name:
        _fold_patches(conv)


@torch.no_grad()
def _fill_centre(conv: nn.Conv2d) -> None:
    conv.weight.zero_()
    conv.weight[:, :, 1, 1] = nn.init.orthogonal_(torch.empty(conv.weight.shape[:2]))


@torch.no_grad()
def keep_pointwise(core: AutoencoderKL) -> None:
    """Clear all but the centre of the first and the last convolution; call after every update.

    They are the two that growth moves to the finer scale, where only a pointwise map means the
    same.
    """
    for conv in (core.encoder.conv_in, core.decoder.conv_out):
        centre = conv.weight[:, :, 1, 1].clone()
        conv.weight.zero_()
        conv.weight[:, :, 1, 1] = centre


def _fold_patches(conv: nn.Conv2d) -> None:
    """Start a strided convolution as an orthogonal map of 2 × 2 patches."""
    width = conv.out_channels
    patches = nn.init.orthogonal_(torch.empty(width, width * 4)).view(width, width, 2, 2)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :, :2, :2] = patches * 2**0.5


def _quieten_latents(conv: nn.Conv2d) -> None:
    """Let the encoder start with a small variance: the second half of its outputs."""
    half = conv.out_channels // 2
    with torch.no_grad():
        conv.weight[half:] *= 0.1
        assert conv.bias is not None
        conv.bias[half:] = _LOG_VARIANCE_START


def grow(core: AutoencoderKL) -> AutoencoderKL:
    """An autoencoder with four times the core's scale and the same latents, without training.

    New encoder levels average 2 × 2 pixels; new decoder levels are the identity and an upsampling
    by a 3 × 3 binomial filter, of the core's last features.
    """
    config = core.config
    channels = tuple(config.block_out_channels)
    outer = (channels[0],) * OUTER_LEVELS
    grown = _autoencoder(outer + channels, config.norm_num_groups, config.latent_channels)
    own = grown.state_dict()
    for name, value in core.state_dict().items():
        own[_grown_name(name)].copy_(value)
    with torch.no_grad():
        _make_outer_levels_plain(grown, len(channels))
    grown.register_to_config(scaling_factor=config.scaling_factor, shift_factor=config.shift_factor)
    return grown.eval()


def shrink(grown: AutoencoderKL) -> AutoencoderKL:
    """The core inside a grown autoencoder: same latents, a quarter of the scale."""
    config = grown.config
    channels = tuple(config.block_out_channels)[OUTER_LEVELS:]
    core = _autoencoder(channels, config.norm_num_groups, config.latent_channels)
    own = grown.state_dict()
    core.load_state_dict({name: own[_grown_name(name)] for name in core.state_dict()})
    core.register_to_config(scaling_factor=config.scaling_factor, shift_factor=config.shift_factor)
    return core.eval()


def _grown_name(name: str) -> str:
    """Where a core's tensor goes: encoder levels move inwards, decoder levels stay."""
    prefix = "encoder.down_blocks."
    if not name.startswith(prefix):
        return name
    level, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{int(level) + OUTER_LEVELS}.{rest}"


def _make_outer_levels_plain(grown: AutoencoderKL, core_levels: int) -> None:
    smooth = _BINOMIAL[:, None] * _BINOMIAL[None, :]
    for level in range(core_levels - 1, core_levels - 1 + OUTER_LEVELS):
        _set_depthwise(grown.decoder.up_blocks[level].upsamplers[0].conv, smooth)
    for block in grown.decoder.up_blocks[core_levels:]:
        _make_identity(block)
    average = torch.zeros(3, 3)
    average[:2, :2] = 0.25
    for block in grown.encoder.down_blocks[:OUTER_LEVELS]:
        _set_depthwise(block.downsamplers[0].conv, average)
        _make_identity(block)


def _set_depthwise(conv: nn.Conv2d, kernel: Tensor) -> None:
    conv.weight.zero_()
    conv.bias.zero_()  # type: ignore[union-attr]
    for channel in range(conv.out_channels):
        conv.weight[channel, channel] = kernel


def _make_identity(block: nn.Module) -> None:
    for resnet in block.resnets:  # type: ignore[union-attr]
        resnet.conv2.weight.zero_()
        resnet.conv2.bias.zero_()


def latent_statistics(autoencoder: AutoencoderKL, pictures: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the latents of ``pictures (B, 3, H, W)`` in -1…1."""
    latents = torch.cat([encode(autoencoder, part) for part in torch.split(pictures, 16)])
    return float(latents.mean()), float(latents.std())


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Unscaled latents, the distribution's mode: ``(B, 3, H, W)`` to ``(B, C, H/f, W/f)``."""
    tidy = pictures.contiguous(memory_format=torch.channels_last)
    with autocast():
        latents: Tensor = autoencoder.encode(tidy).latent_dist.mode()
    return latents.float()


@torch.no_grad()
def decode(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures in -1…1 of unscaled ``latents``."""
    tidy = latents.contiguous(memory_format=torch.channels_last)
    with autocast():
        pictures: Tensor = autoencoder.decode(tidy).sample
    return pictures.float().clamp(-1, 1)


def load(folder: Path) -> AutoencoderKL:
    """A saved autoencoder, ready for inference in float32 with the fast memory layout."""
    autoencoder = AutoencoderKL.from_pretrained(folder)
    ready: AutoencoderKL = autoencoder.to(memory_format=torch.channels_last).eval()
    return ready.requires_grad_(False)
