"""From latents to pictures with diffusers' ``AutoencoderKL``, one picture at a time, in strips.

The modules and their weights are diffusers'; the order of the work is ours. An activation is a list
of strips, bands of rows one below the other. A convolution borrows a row from each neighbour, a
GroupNorm takes its statistics over all strips: nothing is approximated, unlike with tiles that are
decoded alone and blended. Between layers only what the next one reads is kept whole. All is in
memory format channels_last. Knows no tokens and no transformer.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from redux_kernels import dispatch
from redux_kernels.group_norm_silu import group_norm_silu, group_norm_statistics, join_statistics
from redux_kernels.self_test import self_test
from redux_pipelines.errors import OutputError

logger = logging.getLogger(__name__)

TILE_ABOVE_PIXELS = 1024 * 1024
STRIP_PIXELS = 128 * 1024
KERNELS = ("group_norm_statistics", "group_norm_silu")
"""The operators it runs, as kernels where both agree with their references."""
Strips = list[Tensor]
"""One image's rows ``(1, C, rows, W)``, from top to bottom."""


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


class Decoder:
    """The decoder half of diffusers' ``vae``, whose weights it uses in place, where they are.

    When made it tests the kernels there, whichever transformer runs beside it.
    """

    def __init__(self, vae: Any) -> None:
        if vae.config.act_fn not in ("silu", "swish"):  # two names of one function
            raise ValueError(f"the autoencoder has act_fn={vae.config.act_fn!r}: FLUX.1 has 'silu'")
        self._decoder = vae.decoder.to(memory_format=torch.channels_last)
        self._post_quant = vae.post_quant_conv
        _test_kernels(self._decoder)

    def __call__(self, latents: Tensor, strips: int = 1) -> Strips:
        """Decode one image's ``latents (1, C, h, w)``; the picture comes in strips.

        ``strips``: into how many to cut, at most h. The middle block, whose attention sees all, is
        not cut: it works at the latents' size.
        """
        decoder = self._decoder
        x = latents.contiguous(memory_format=torch.channels_last)
        if self._post_quant is not None:
            x = self._post_quant(x)
        whole = [decoder.conv_in(x)]
        _middle(decoder.mid_block, whole)
        x_strips = list(whole.pop().tensor_split(min(strips, latents.shape[2]), dim=2))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                _add_resnet(resnet, x_strips)
            for upsampler in block.upsamplers or ():
                x_strips = _upsample(upsampler.conv, x_strips)
        act = _norm_silu(decoder.conv_norm_out, x_strips)
        return [_convolve(decoder.conv_out, x_strips, i, act) for i in range(len(x_strips))]


def _test_kernels(decoder: Any) -> None:
    """Let the kernels run if they are right at every width of ``decoder``, in its dtype.

    At the first width where one is not, both are left to plain torch, with the reason in the log:
    what passed at one width is not known to be right at the others.
    """
    weight = decoder.conv_in.weight
    norms = [each for each in decoder.modules() if isinstance(each, nn.GroupNorm)]
    for channels, groups in sorted({(each.num_channels, each.num_groups) for each in norms}):
        verdicts = self_test(
            weight.device,
            heads=1,
            head_dim=channels,
            dtype=weight.dtype,
            groups=groups,
            operators=KERNELS,
        )
        refused = {name: reason for name, reason in verdicts.items() if reason is not None}
        for name, reason in refused.items():  # news on a GPU only
            level = logging.WARNING if weight.is_cuda else logging.DEBUG
            logger.log(level, "kernel %s is not used for %d channels: %s", name, channels, reason)
        if refused:
            for name in KERNELS:
                dispatch.record(name, weight.device, refused.get(name, "the other kernel is wrong"))
            return


def _middle(block: Any, x: Strips) -> None:
    """Change ``x``, one strip, in place."""
    _add_resnet(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            x[0] = attention(x[0]).contiguous(memory_format=torch.channels_last)
        _add_resnet(resnet, x)


def _add_resnet(block: Any, x: Strips) -> None:
    """Change ``x`` in place; strip by strip, the hidden activation makes room for the sum."""
    act = _norm_silu(block.norm1, x)
    hidden: list[Any] = [_convolve(block.conv1, x, i, act) for i in range(len(x))]
    act = _norm_silu(block.norm2, hidden)
    for i in range(len(x)):
        if block.conv_shortcut is not None:
            x[i] = block.conv_shortcut(x[i])
        x[i] += _convolve(block.conv2, hidden, i, act)
        if i:
            hidden[i - 1] = None  # the strips below need no more of it


def _upsample(conv: nn.Module, x: Strips) -> Strips:
    """Twice the rows and columns, each pixel repeated, then convolved."""
    return [
        _convolve(conv, x, i, lambda strip: F.interpolate(strip, scale_factor=2.0), scale=2)
        for i in range(len(x))
    ]


def _convolve(
    conv: nn.Module, x: Strips, i: int, before: Callable[[Tensor], Tensor], scale: int = 1
) -> Tensor:
    """3 × 3 convolution of ``before(x)``, the strip ``i`` of it.

    ``before`` acts on each pixel alone and makes ``scale`` rows of one. Rows of the neighbours go
    in, so that the convolution pads with zeros at the picture's edge only, and come out again.
    """
    above, below = x[max(i - 1, 0) : i], x[i + 1 : i + 2]
    parts = [*(s[:, :, -1:] for s in above), x[i], *(s[:, :, :1] for s in below)]
    joined = torch.cat(parts, dim=2) if len(parts) > 1 else x[i]
    first, rows = len(above) * scale, x[i].shape[2] * scale
    out: Tensor = conv(before(joined))[:, :, first : first + rows]
    return out


def _norm_silu(norm: Any, x: Strips) -> Callable[[Tensor], Tensor]:
    """GroupNorm with the statistics of all strips, then SiLU, to be called on each."""
    parts = [group_norm_statistics(_pixels(strip), norm.num_groups) for strip in x]
    mean, var = join_statistics(parts, [strip.shape[2] for strip in x])

    def apply(strip: Tensor) -> Tensor:
        y: Tensor = group_norm_silu(_pixels(strip), mean, var, norm.weight, norm.bias, norm.eps)
        return y.view(1, *strip.shape[2:], -1).permute(0, 3, 1, 2)

    return apply


def _pixels(x: Tensor) -> Tensor:
    """``(1, C, H, W)`` as ``(1, H · W, C)``; no copy if it is in channels_last already."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2)
