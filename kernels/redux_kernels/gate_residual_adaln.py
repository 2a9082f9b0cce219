"""Gated residual and the next LayerNorm with its modulation, in one pass over the rows.

What stands between two linears of FLUX's blocks, also across a block's border: the residual of one
block and the first norm of the next read and write each row once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redux_kernels import checks, dispatch, reference
from redux_kernels.adaln import plan_rows
from redux_kernels.checks import image_stride
from redux_kernels.compiler import constexpr, jit, tensor, tl
from redux_kernels.device_functions import normalize_rows, scale_of_rows
from redux_kernels.registration import operator, register_fake


@jit(do_not_specialize=["rows"])
def _gate_residual_adaln_kernel(
    x_ptr: tensor, y_ptr: tensor, gate_ptr: tensor, scale_ptr: tensor, shift_ptr: tensor,
    sum_ptr: tensor, h_ptr: tensor, row_scale_ptr: tensor,
    rows: tensor, x_batch: tensor, x_row: tensor, y_batch: tensor, y_row: tensor,
    gate_batch: tensor, scale_batch: tensor, shift_batch: tensor, eps: tensor,
    width: constexpr, tile: constexpr, block: constexpr, quantize: constexpr,
) -> None:  # fmt: skip
    """``tile`` rows of one image; ``sum`` and ``h`` are contiguous."""
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * tile
    row = tl.arange(0, tile)
    col = tl.arange(0, block)
    in_width = col < width
    mask = (first + row < rows)[:, None] & in_width[None, :]

    x_ptr += batch * x_batch + first.to(tl.int64) * x_row
    y_ptr += batch * y_batch + first.to(tl.int64) * y_row
    x = tl.load(x_ptr + row[:, None] * x_row + col[None, :], mask=mask, other=0.0)
    y = tl.load(y_ptr + row[:, None] * y_row + col[None, :], mask=mask, other=0.0)
    gate = tl.load(gate_ptr + batch * gate_batch + col, mask=in_width, other=0.0)
    scale = tl.load(scale_ptr + batch * scale_batch + col, mask=in_width, other=0.0)
    shift = tl.load(shift_ptr + batch * shift_batch + col, mask=in_width, other=0.0)

    out_row = batch * rows + first
    at = row[:, None] * width + col[None, :]
    total = x.to(tl.float32) + gate.to(tl.float32)[None, :] * y.to(tl.float32)
    total = total.to(x.dtype)  # the next norm sees what the next residual will see
    tl.store(sum_ptr + out_row * width + at, total, mask=mask)

    h = normalize_rows(total.to(tl.float32), mask, width, eps)
    h = h * (1.0 + scale.to(tl.float32))[None, :] + shift.to(tl.float32)[None, :]
    if quantize:
        row_scale = scale_of_rows(tl.max(tl.abs(h), axis=1))
        h = h / row_scale[:, None]
        tl.store(row_scale_ptr + out_row + row, row_scale, mask=first + row < rows)
    tl.store(h_ptr + out_row * width + at, h.to(h_ptr.dtype.element_ty), mask=mask)


def launch(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float,
    q: Tensor | None = None, row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernel on checked tensors: (sum, h), or (sum, q) where it writes to ``q``."""
    batch, rows, width = x.shape
    plan = plan_rows(batch, rows, width)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = torch.empty_like(total) if q is None else q
    with dispatch.on_device_of(x):
        _gate_residual_adaln_kernel[plan.grid](
            x, y, gate, scale, shift, total, h, x if row_scale is None else row_scale,
            rows, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
            image_stride(gate), image_stride(scale), image_stride(shift), eps,
            width=width, tile=plan.rows, block=plan.block, quantize=q is not None,
            num_warps=plan.warps,
        )  # fmt: skip
    return total, h


def check(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Raise ``ValueError`` unless the tensors are those that ``gate_residual_adaln`` describes."""
    checks.check_rows("x", x)
    checks.check_rows("y", y)
    checks.check_shape("y", y, tuple(x.shape), "like x")
    for name, vector in (("gate", gate), ("scale", scale), ("shift", shift)):
        checks.check_vector(name, vector, x)
    checks.check_same_device(x=x, y=y, gate=gate, scale=scale, shift=shift)


@operator("redux::gate_residual_adaln", mutates_args=())
def gate_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The residual ``s = x + gate * y``, and its ``adaln``: ``(s, norm(s) * (1 + scale) + shift)``.

    ``s`` is computed in float32 and rounded once; the norm is that of the rounded ``s``, so that
    the result is the same as ``adaln(s, scale, shift)``.

    Args:
        x: (B, S, H), H <= 16384, contiguous along H; images and rows may lie apart.
        y: as ``x``, for example a linear's output.
        gate: (B, H), contiguous along H; the images' vectors may lie apart. Or (H,) for all.
        scale: as ``gate``.
        shift: as ``gate``.
        eps: added to the variance.

    Returns:
        Two (B, S, H), contiguous, in the dtype of ``x``: bfloat16, float16 or float32.
        Error: one unit in the last place in bfloat16 and float16, 2e-6 + 1e-5 |h| in float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices are not those above.
    """
    checks.once(check, x, y, gate, scale, shift)
    if dispatch.runs_kernel("gate_residual_adaln", x):
        return launch(x, y, gate, scale, shift, eps)
    return reference.gate_residual_adaln(x, y, gate, scale, shift, eps)


@register_fake(gate_residual_adaln)
def _(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    check(x, y, gate, scale, shift)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total)


def check_quantizing(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, q: Tensor, row_scale: Tensor
) -> None:
    """Raise ``ValueError`` unless the tensors are those of ``gate_residual_adaln_quantize``."""
    check(x, y, gate, scale, shift)
    checks.check_quantized(x, x.shape[-1], q, row_scale)


@operator("redux::gate_residual_adaln_quantize", mutates_args=("q", "row_scale"))
def gate_residual_adaln_quantize(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, q: Tensor, row_scale: Tensor,
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """``gate_residual_adaln`` with the normed rows quantised, into ``q`` and ``row_scale``.

    These get what ``adaln_quantize(s, scale, shift, q, row_scale)`` writes, with its error.

    Args:
        x: as ``gate_residual_adaln``.
        y: as ``gate_residual_adaln``.
        gate: as ``gate_residual_adaln``.
        scale: as ``gate``.
        shift: as ``gate``.
        q: (B·S, H), contiguous, float8_e4m3fn: gets the rows, image by image.
        row_scale: (B·S, 1), contiguous, float32: gets their scales.
        eps: added to the variance.

    Returns:
        s (B, S, H), contiguous, in the dtype of ``x``.

    Raises:
        ValueError: as ``gate_residual_adaln``, or ``q`` or ``row_scale`` is no room for the rows.
    """
    checks.once(check_quantizing, x, y, gate, scale, shift, q, row_scale)
    if dispatch.runs_kernel("gate_residual_adaln_quantize", x):
        return launch(x, y, gate, scale, shift, eps, q, row_scale)[0]
    total, *made = reference.gate_residual_adaln_quantize(x, y, gate, scale, shift, eps)
    checks.write_quantized((made[0], made[1]), q, row_scale)
    return total


@register_fake(gate_residual_adaln_quantize)
def _(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, q: Tensor, row_scale: Tensor,
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    check_quantizing(x, y, gate, scale, shift, q, row_scale)
    return torch.empty_like(x, memory_format=torch.contiguous_format)
