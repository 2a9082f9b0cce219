"""GELU of an MLP's rows, quantised to e4m3, with other columns beside them if asked.

What the last linear of a double block (GELU alone) and of a single block (attention beside GELU)
take in fp8: one scale a row, over all of its columns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from redux_kernels import checks, dispatch, reference
from redux_kernels.compiler import constexpr, jit, next_power_of_2, tensor, tl
from redux_kernels.device_functions import gelu_tanh, scale_of_rows
from redux_kernels.registration import operator, register_fake


class WholeRowPlan(NamedTuple):
    """One row a program, held in registers while its largest magnitude is found."""

    block: int
    beside_block: int
    warps: int
    grid: tuple[int, int]
    """(rows, batch)."""


@lru_cache(maxsize=1024)
def plan_whole_row(batch: int, rows: int, width: int, beside: int) -> WholeRowPlan:
    """About 32 elements a thread: 16 warps at 12288 columns, 1 at 1024."""
    block = next_power_of_2(max(width, 16))
    beside_block = next_power_of_2(max(beside, 16))
    return WholeRowPlan(block, beside_block, max(1, min(16, block // 1024)), (rows, batch))


@jit(do_not_specialize=["rows"])
def _gelu_quantize_kernel(
    mlp_ptr: tensor, beside_ptr: tensor, q_ptr: tensor, row_scale_ptr: tensor,
    rows: tensor, mlp_batch: tensor, mlp_row: tensor, beside_batch: tensor, beside_row: tensor,
    width: constexpr, block: constexpr, extra: constexpr, extra_block: constexpr,
) -> None:  # fmt: skip
    """One row: ``extra`` columns as they are, then GELU of ``width``; one scale for all."""
    row = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, block)
    mask = col < width
    mlp = tl.load(mlp_ptr + batch * mlp_batch + row * mlp_row + col, mask=mask, other=0.0)
    y = gelu_tanh(mlp.to(tl.float32))
    amax = tl.max(tl.abs(y), axis=0)

    out_row = batch * rows + row
    q_ptr += out_row * (extra + width)
    if extra > 0:
        beside_col = tl.arange(0, extra_block)
        beside_mask = beside_col < extra
        beside_ptr += batch * beside_batch + row * beside_row
        a = tl.load(beside_ptr + beside_col, mask=beside_mask, other=0.0).to(tl.float32)
        row_scale = scale_of_rows(tl.maximum(amax, tl.max(tl.abs(a), axis=0)))
        a = (a / row_scale).to(q_ptr.dtype.element_ty)
        tl.store(q_ptr + beside_col, a, mask=beside_mask)
    else:
        row_scale = scale_of_rows(amax)
    tl.store(row_scale_ptr + out_row, row_scale)
    tl.store(q_ptr + extra + col, (y / row_scale).to(q_ptr.dtype.element_ty), mask=mask)


def launch(mlp: Tensor, beside: Tensor | None, q: Tensor, row_scale: Tensor) -> None:
    """Run the kernel on checked tensors, into ``q`` and ``row_scale``."""
    batch, rows, width = mlp.shape
    extra = 0 if beside is None else beside.shape[-1]
    other = mlp if beside is None else beside
    plan = plan_whole_row(batch, rows, width, extra)
    with dispatch.on_device_of(mlp):
        _gelu_quantize_kernel[plan.grid](
            mlp, other, q, row_scale,
            rows, mlp.stride(0), mlp.stride(1), other.stride(0), other.stride(1),
            width=width, block=plan.block, extra=extra, extra_block=plan.beside_block,
            num_warps=plan.warps,
        )  # fmt: skip


def check(mlp: Tensor, beside: Tensor | None, q: Tensor, row_scale: Tensor) -> None:
    """Raise ``ValueError`` unless the tensors are those that ``gelu_quantize`` describes."""
    checks.check_rows("mlp", mlp)
    if beside is not None:
        checks.check_rows("beside", beside)
        checks.check_shape("beside", beside, (*mlp.shape[:2], beside.shape[-1]),
                           "(batch, rows, columns)")  # fmt: skip
    checks.check_same_device(mlp=mlp, beside=beside)
    extra = 0 if beside is None else beside.shape[-1]
    checks.check_quantized(mlp, extra + mlp.shape[-1], q, row_scale)


@operator("redux::gelu_quantize", mutates_args=("q", "row_scale"))
def gelu_quantize(mlp: Tensor, beside: Tensor | None, q: Tensor, row_scale: Tensor) -> None:
    """Quantise the rows ``h = [beside, gelu(mlp)]`` to e4m3, into ``q`` and ``row_scale``.

    GELU is that of ``gelu_into``; ``row_scale = max|h| / 448`` over a whole row and
    ``q = round(h / row_scale)``, from the float32 ``h``.

    Args:
        mlp: (B, S, F), F <= 16384, contiguous along F; rows may lie apart.
        beside: (B, S, C), C <= 16384, contiguous along C, or None: attention's output, say.
        q: (B·S, C + F), contiguous, float8_e4m3fn: gets the rows, image by image.
        row_scale: (B·S, 1), contiguous, float32: gets their scales.

    Error: half a step of e4m3 (2^-4 relative, 2^-10 * row_scale absolute); where ``h`` lies on
        the border between two numbers the kernel and the reference may choose differently.

    Raises:
        ValueError: shapes, dtypes, strides or devices are not those above.
    """
    checks.once(check, mlp, beside, q, row_scale)
    if dispatch.runs_kernel("gelu_quantize", mlp):
        launch(mlp, beside, q, row_scale)
    else:
        checks.write_quantized(reference.gelu_quantize(mlp, beside), q, row_scale)


@register_fake(gelu_quantize)
def _(mlp: Tensor, beside: Tensor | None, q: Tensor, row_scale: Tensor) -> None:
    check(mlp, beside, q, row_scale)
