"""LayerNorm and modulation of rows in one pass, with or without quantisation to e4m3.

FLUX's adaptive LayerNorm: 2 of them per stream in a double block, 1 in a single block. Reads each
row once and writes it once; knows nothing of the linears before and after it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from redux_kernels import checks, dispatch, reference
from redux_kernels.checks import image_stride
from redux_kernels.compiler import constexpr, jit, next_power_of_2, tensor, tl
from redux_kernels.device_functions import normalize_rows, scale_of_rows
from redux_kernels.registration import operator, register_fake


class RowPlan(NamedTuple):
    """How whole rows are spread over programs."""

    rows: int
    """Rows a program holds in registers at a time."""
    block: int
    """Columns, with the padding to a power of two."""
    warps: int
    grid: tuple[int, int]
    """(tiles of rows, batch): no tile spans two images, so one modulation serves a tile."""


@lru_cache(maxsize=1024)
def plan_rows(batch: int, rows: int, width: int) -> RowPlan:
    """Give each thread about 32 elements, and narrow rows to one program together.

    At 3072 columns: one row, 4096 columns, 4 warps, so that a thread has four 128-bit loads under
    way per operand. At 256: eight rows and 2 warps.
    """
    block = next_power_of_2(max(width, 16))
    tile = max(1, min(8, 2048 // block))
    warps = max(1, min(16, tile * block // 1024))
    return RowPlan(tile, block, warps, (-(-rows // tile), batch))


@jit(do_not_specialize=["rows"])
def _adaln_kernel(
    x_ptr: tensor, scale_ptr: tensor, shift_ptr: tensor, h_ptr: tensor, row_scale_ptr: tensor,
    rows: tensor, x_batch: tensor, x_row: tensor, scale_batch: tensor, shift_batch: tensor,
    eps: tensor,
    width: constexpr, tile: constexpr, block: constexpr, quantize: constexpr,
) -> None:  # fmt: skip
    """``tile`` rows of one image; ``h`` is contiguous, of float or e4m3 elements."""
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * tile
    row = tl.arange(0, tile)
    col = tl.arange(0, block)
    in_width = col < width
    mask = (first + row < rows)[:, None] & in_width[None, :]

    x_ptr += batch * x_batch + first.to(tl.int64) * x_row
    x = tl.load(x_ptr + row[:, None] * x_row + col[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + batch * scale_batch + col, mask=in_width, other=0.0)
    shift = tl.load(shift_ptr + batch * shift_batch + col, mask=in_width, other=0.0)

    h = normalize_rows(x, mask, width, eps)
    h = h * (1.0 + scale.to(tl.float32))[None, :] + shift.to(tl.float32)[None, :]

    out_row = batch * rows + first
    at = row[:, None] * width + col[None, :]
    h_ptr += out_row * width
    if quantize:
        row_scale = scale_of_rows(tl.max(tl.abs(h), axis=1))
        h = h / row_scale[:, None]
        tl.store(row_scale_ptr + out_row + row, row_scale, mask=first + row < rows)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=mask)


def launch(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float,
    q: Tensor | None = None, row_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run the kernel on checked tensors: h, or what it writes to, ``q`` beside ``row_scale``."""
    batch, rows, width = x.shape
    plan = plan_rows(batch, rows, width)
    h = torch.empty_like(x, memory_format=torch.contiguous_format) if q is None else q
    with dispatch.on_device_of(x):
        _adaln_kernel[plan.grid](
            x, scale, shift, h, x if row_scale is None else row_scale,
            rows, x.stride(0), x.stride(1), image_stride(scale), image_stride(shift), eps,
            width=width, tile=plan.rows, block=plan.block, quantize=q is not None,
            num_warps=plan.warps,
        )  # fmt: skip
    return h


def check(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Raise ``ValueError`` unless the tensors are those that ``adaln`` describes."""
    checks.check_rows("x", x)
    checks.check_vector("scale", scale, x)
    checks.check_vector("shift", shift, x)
    checks.check_same_device(x=x, scale=scale, shift=shift)


@operator("redux::adaln", mutates_args=())
def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without weights, then modulation: ``norm(x) * (1 + scale) + shift``.

    ``norm(x) = (x - mean(x)) / sqrt(var(x) + eps)`` along the last axis, in float32, rounded once.

    Args:
        x: (B, S, H), H <= 16384, contiguous along H; images and rows may lie apart.
        scale: (B, H), contiguous along H; the images' vectors may lie apart. Or (H,) for all.
        shift: as ``scale``.
        eps: added to the variance.

    Returns:
        (B, S, H), contiguous, in the dtype of ``x``: bfloat16, float16 or float32.
        Error: one unit in the last place in bfloat16 and float16, 2e-6 + 1e-5 |h| in float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices are not those above.
    """
    checks.once(check, x, scale, shift)
    if dispatch.runs_kernel("adaln", x):
        return launch(x, scale, shift, eps)
    return reference.adaln(x, scale, shift, eps)


@register_fake(adaln)
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    check(x, scale, shift)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check_quantizing(x: Tensor, scale: Tensor, shift: Tensor, q: Tensor, row_scale: Tensor) -> None:
    """Raise ``ValueError`` unless the tensors are those that ``adaln_quantize`` describes."""
    check(x, scale, shift)
    checks.check_quantized(x, x.shape[-1], q, row_scale)


@operator("redux::adaln_quantize", mutates_args=("q", "row_scale"))
def adaln_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, q: Tensor, row_scale: Tensor, eps: float = 1e-6
) -> None:
    """``adaln``, with its rows quantised to e4m3 in the same pass, into ``q`` and ``row_scale``.

    ``row_scale = max|h| / 448`` over each row and ``q = round(h / row_scale)``, from the float32
    ``h``: what a row-wise scaled matrix product (``torch._scaled_mm``) takes.

    Args:
        x: as ``adaln``.
        scale: as ``adaln``.
        shift: as ``adaln``.
        q: (B·S, H), contiguous, float8_e4m3fn: gets the rows, image by image.
        row_scale: (B·S, 1), contiguous, float32: gets their scales.
        eps: added to the variance.

    Error: half a step of e4m3 (2^-4 relative, 2^-10 * row_scale absolute); where ``h`` lies on
        the border between two numbers the kernel and the reference may choose differently.

    Raises:
        ValueError: as ``adaln``.
    """
    checks.once(check_quantizing, x, scale, shift, q, row_scale)
    if dispatch.runs_kernel("adaln_quantize", x):
        launch(x, scale, shift, eps, q, row_scale)
    else:
        checks.write_quantized(reference.adaln_quantize(x, scale, shift, eps), q, row_scale)


@register_fake(adaln_quantize)
def _(
    x: Tensor, scale: Tensor, shift: Tensor, q: Tensor, row_scale: Tensor, eps: float = 1e-6
) -> None:
    check_quantizing(x, scale, shift, q, row_scale)
