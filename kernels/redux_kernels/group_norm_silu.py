"""GroupNorm and SiLU over a picture's pixels, in two passes: statistics, then both in one.

What stands before each convolution of an autoencoder's decoder. A pixel is a row, as in torch's
memory format channels_last. The passes are two operators, so that a picture can come in parts: the
statistics of parts join (``join_statistics``), and each part is normed by those of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from redux_kernels import checks, dispatch, reference
from redux_kernels.compiler import constexpr, jit, next_power_of_2, tensor, tl
from redux_kernels.registration import operator, register_fake

CHUNKS = 1024  # programs that share a picture's statistics: several for each of a GPU's processors


class PixelPlan(NamedTuple):
    """How pixels are spread over programs."""

    tile: int
    """Pixels a program holds in registers at a time."""
    block: int
    """Channels, with the padding to a power of two."""
    warps: int
    steps: int
    """Tiles that one program of the first pass takes, one after the other."""
    chunks: int
    """Programs of the first pass, for each image."""


def plan_pixels(rows: int, channels: int) -> PixelPlan:
    """4096 elements a tile with 4 warps: four 128-bit loads a thread."""
    block = next_power_of_2(max(channels, 16))
    tile = max(1, 4096 // block)
    tiles = max(1, -(-rows // tile))
    steps = -(-tiles // CHUNKS)
    return PixelPlan(tile, block, max(1, min(16, tile * block // 1024)), steps, -(-tiles // steps))


@jit(do_not_specialize=["rows", "steps"])
def _channel_statistics_kernel(
    x_ptr: tensor, parts_ptr: tensor, rows: tensor, steps: tensor, x_batch: tensor, x_row: tensor,
    channels: constexpr, tile: constexpr, block: constexpr,
) -> None:  # fmt: skip
    """Mean and sum of squared deviations of each channel over ``steps * tile`` pixels.

    Taken about the chunk's first pixel: sums of squares about zero cancel where a channel's mean is
    far from it. ``parts`` (B, chunks, 2, C) is contiguous.
    """
    chunk = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, tile)
    col = tl.arange(0, block)
    in_width = col < channels
    first = chunk * steps * tile
    x_ptr += batch * x_batch + first.to(tl.int64) * x_row
    pivot = tl.load(x_ptr + col, mask=in_width, other=0.0).to(tl.float32)
    total = tl.zeros((block,), tl.float32)
    squares = tl.zeros((block,), tl.float32)
    for step in range(steps):
        inside = (first + step * tile + row < rows)[:, None] & in_width[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row + col[None, :], mask=inside, other=0.0)
        off = tl.where(inside, x.to(tl.float32) - pivot[None, :], 0.0)
        total += tl.sum(off, axis=0)
        squares += tl.sum(off * off, axis=0)
        x_ptr += tile * x_row
    count = tl.minimum(rows - first, steps * tile).to(tl.float32)
    parts_ptr += (batch * tl.num_programs(0) + chunk) * 2 * channels + col
    tl.store(parts_ptr, pivot + total / count, mask=in_width)
    tl.store(parts_ptr + channels, squares - total * total / count, mask=in_width)


@jit(do_not_specialize=["rows", "chunks", "size"])
def _join_channels_kernel(
    parts_ptr: tensor, mean_ptr: tensor, var_ptr: tensor, rows: tensor, chunks: tensor,
    size: tensor, channels: constexpr, width: constexpr, tile: constexpr, block: constexpr,
) -> None:  # fmt: skip
    """One group of ``width`` channels of one image, from chunks of ``size`` pixels."""
    group = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, tile)
    col = tl.arange(0, block)
    in_width = col < width
    parts_ptr += batch * chunks * 2 * channels + group * width + col[None, :]
    weighted = tl.zeros((tile, block), tl.float32)
    for first in range(0, chunks, tile):
        chunk = first + row
        inside = (chunk < chunks)[:, None] & in_width[None, :]
        mean = tl.load(parts_ptr + chunk[:, None] * 2 * channels, mask=inside, other=0.0)
        weighted += mean * tl.minimum(rows - chunk * size, size).to(tl.float32)[:, None]
    elements = rows.to(tl.float32) * width
    joint = tl.sum(tl.sum(weighted, axis=1), axis=0) / elements
    squares = tl.zeros((tile, block), tl.float32)
    for first in range(0, chunks, tile):
        chunk = first + row
        inside = (chunk < chunks)[:, None] & in_width[None, :]
        at = parts_ptr + chunk[:, None] * 2 * channels
        off = tl.where(inside, tl.load(at, mask=inside, other=0.0) - joint, 0.0)
        pixels = tl.minimum(rows - chunk * size, size).to(tl.float32)[:, None]
        squares += off * off * pixels + tl.load(at + channels, mask=inside, other=0.0)
    at = batch * tl.num_programs(0) + group
    tl.store(mean_ptr + at, joint)
    tl.store(var_ptr + at, tl.sum(tl.sum(squares, axis=1), axis=0) / elements)


@jit(do_not_specialize=["rows"])
def _group_norm_silu_kernel(
    x_ptr: tensor, mean_ptr: tensor, var_ptr: tensor, weight_ptr: tensor, bias_ptr: tensor,
    y_ptr: tensor, rows: tensor, x_batch: tensor, x_row: tensor, eps: tensor,
    channels: constexpr, width: constexpr, tile: constexpr, block: constexpr,
) -> None:  # fmt: skip
    """``tile`` pixels of one image; ``y`` is contiguous."""
    first = tl.program_id(0).to(tl.int64) * tile
    batch = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, tile)
    col = tl.arange(0, block)
    in_width = col < channels
    mask = (first + row < rows)[:, None] & in_width[None, :]

    x_ptr += batch * x_batch + first * x_row
    x = tl.load(x_ptr + row[:, None] * x_row + col[None, :], mask=mask, other=0.0).to(tl.float32)
    group = batch * (channels // width) + col // width
    mean = tl.load(mean_ptr + group, mask=in_width, other=0.0)
    var = tl.load(var_ptr + group, mask=in_width, other=0.0)
    weight = tl.load(weight_ptr + col, mask=in_width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=in_width, other=0.0).to(tl.float32)

    y = (x - mean[None, :]) * (weight * tl.rsqrt(var + eps))[None, :] + bias[None, :]
    y = y / (1.0 + tl.exp(-y))
    y_ptr += (batch * rows + first) * channels
    at = row[:, None] * channels + col[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def launch_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Run the two kernels of the first pass on checked tensors."""
    return launch_join(launch_channels(x), x.shape[1], groups)


def launch_channels(x: Tensor) -> Tensor:
    """Statistics of the channels of each chunk: (B, chunks, 2, C)."""
    batch, rows, channels = x.shape
    plan = plan_pixels(rows, channels)
    parts = x.new_empty((batch, plan.chunks, 2, channels), dtype=torch.float32)
    with dispatch.on_device_of(x):
        _channel_statistics_kernel[plan.chunks, batch](
            x, parts, rows, plan.steps, x.stride(0), x.stride(1),
            channels=channels, tile=plan.tile, block=plan.block, num_warps=plan.warps,
        )  # fmt: skip
    return parts


def launch_join(parts: Tensor, rows: int, groups: int) -> tuple[Tensor, Tensor]:
    """Statistics of groups over all ``rows``, from those of chunks."""
    batch, chunks, _, channels = parts.shape
    plan, width = plan_pixels(rows, channels), channels // groups
    mean, var = (parts.new_empty((batch, groups)) for _ in range(2))
    block = next_power_of_2(width)
    with dispatch.on_device_of(parts):
        _join_channels_kernel[groups, batch](
            parts, mean, var, rows, chunks, plan.steps * plan.tile,
            channels=channels, width=width, tile=max(1, 1024 // block), block=block, num_warps=4,
        )  # fmt: skip
    return mean, var


def launch(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Run the kernel of the second pass on checked tensors."""
    batch, rows, channels = x.shape
    plan = plan_pixels(rows, channels)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    with dispatch.on_device_of(x):
        _group_norm_silu_kernel[-(-rows // plan.tile), batch](
            x, mean, var, weight, bias, y, rows, x.stride(0), x.stride(1), eps,
            channels=channels, width=channels // mean.shape[1], tile=plan.tile, block=plan.block,
            num_warps=plan.warps,
        )  # fmt: skip
    return y


def check_statistics(x: Tensor, groups: int) -> None:
    """Raise ``ValueError`` unless ``group_norm_statistics`` takes these."""
    checks.check_rows("x", x)
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups must divide the {x.shape[-1]} channels of x, got {groups}")
    if x.shape[1] == 0:
        raise ValueError("x must have at least one row: no pixels have no mean")


def check(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ``ValueError`` unless the tensors are those that ``group_norm_silu`` describes."""
    checks.check_rows("x", x)
    for name, vector in (("weight", weight), ("bias", bias)):
        checks.check_float(name, vector)
        checks.check_shape(name, vector, (x.shape[-1],), "(channels,)")
        checks.check_last_stride(name, vector)
    if mean.dim() != 2 or mean.shape[1] < 1 or x.shape[-1] % mean.shape[1]:
        raise ValueError(
            f"mean must be (batch, groups), groups dividing the {x.shape[-1]} channels of x, "
            f"got shape {tuple(mean.shape)}"
        )
    for name, each in (("mean", mean), ("var", var)):
        checks.check_shape(name, each, (x.shape[0], mean.shape[1]), "(batch, groups)")
        checks.check_dtype(name, each, torch.float32)
        if not each.is_contiguous():
            raise ValueError(f"{name} must be contiguous: call .contiguous() on it")
    checks.check_same_device(x=x, mean=mean, var=var, weight=weight, bias=bias)


@operator("redux::group_norm_statistics", mutates_args=())
def group_norm_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each image's groups of neighbouring channels, over all its pixels.

    Args:
        x: (B, S, C), C <= 16384, S >= 1, contiguous along C; images and pixels may lie apart.
        groups: divides C.

    Returns:
        Two (B, groups), float32; the variance divides by the count, as GroupNorm's does.
        Error: 1e-5 times the standard deviation and its square.

    Raises:
        ValueError: shapes, dtypes or strides are not those above.
    """
    checks.once(check_statistics, x, groups)
    if dispatch.runs_kernel("group_norm_statistics", x):
        return launch_statistics(x, groups)
    return reference.group_norm_statistics(x, groups)


@register_fake(group_norm_statistics)
def _(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    check_statistics(x, groups)
    mean = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return mean, torch.empty_like(mean)


def join_statistics(
    parts: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Statistics of the whole from those of its parts, which have ``sizes`` pixels."""
    if len(parts) == 1:
        return parts[0]
    means, variances = (torch.stack(each) for each in zip(*parts, strict=True))
    shares = [size / sum(sizes) for size in sizes]
    share = means.new_tensor(shares)[:, None, None]
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


@operator("redux::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> Tensor:
    """``silu((x - mean) / sqrt(var + eps) * weight + bias)``, in float32, rounded once.

    ``silu(y) = y / (1 + exp(-y))``.

    Args:
        x: (B, S, C), C <= 16384, contiguous along C; images and pixels may lie apart.
        mean: (B, groups), float32, contiguous: one for C / groups neighbouring channels.
        var: as ``mean``.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.

    Returns:
        (B, S, C), contiguous, in the dtype of ``x``: bfloat16, float16 or float32.
        Error: one unit in the last place in bfloat16 and float16, 2e-6 + 1e-5 |y| in float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices are not those above.
    """
    checks.once(check, x, mean, var, weight, bias)
    if dispatch.runs_kernel("group_norm_silu", x):
        return launch(x, mean, var, weight, bias, eps)
    return reference.group_norm_silu(x, mean, var, weight, bias, eps)


@register_fake(group_norm_silu)
def _(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> Tensor:
    check(x, mean, var, weight, bias)
    return torch.empty_like(x, memory_format=torch.contiguous_format)
