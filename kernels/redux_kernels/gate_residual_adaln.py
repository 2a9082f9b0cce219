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
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, *, quantize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel on checked tensors: (sum, h, x) or, quantised, (sum, q, row_scale)."""
    batch, rows, width = x.shape
    plan = plan_rows(batch, rows, width)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    h, row_scale = checks.empty_quantized(x, width) if quantize else (torch.empty_like(total), x)
    with dispatch.on_device_of(x):
        _gate_residual_adaln_kernel[plan.grid](
            x, y, gate, scale, shift, total, h, row_scale,
            rows, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
            image_stride(gate), image_stride(scale), image_stride(shift), eps,
            width=width, tile=plan.rows, block=plan.block, quantize=quantize,
            num_warps=plan.warps,
        )  # fmt: skip
    return total, h, row_scale


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
        return launch(x, y, gate, scale, shift, eps, quantize=False)[:2]
    return reference.gate_residual_adaln(x, y, gate, scale, shift, eps)


@register_fake(gate_residual_adaln)
def _(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    check(x, y, gate, scale, shift)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total)


@operator("redux::gate_residual_adaln_quantize", mutates_args=())
def gate_residual_adaln_quantize(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """``gate_residual_adaln`` with the normed rows quantised: ``(s, q, row_scale)``.

    ``q`` and ``row_scale`` are those of ``adaln_quantize(s, scale, shift)``, with its error.

    Returns:
        s (B, S, H) in the dtype of ``x``; q (B, S, H) in float8_e4m3fn; row_scale (B, S, 1),
        float32; all contiguous.

    Raises:
        ValueError: as ``gate_residual_adaln``.
    """
    checks.once(check, x, y, gate, scale, shift)
    if dispatch.runs_kernel("gate_residual_adaln_quantize", x):
        return launch(x, y, gate, scale, shift, eps, quantize=True)
    return reference.gate_residual_adaln_quantize(x, y, gate, scale, shift, eps)


@register_fake(gate_residual_adaln_quantize)
def _(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    check(x, y, gate, scale, shift)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, *checks.empty_quantized(x, x.shape[-1])
