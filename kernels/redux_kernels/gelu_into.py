"""GELU of an MLP's rows, written into columns of a wider buffer.

In a single block attention and GELU(mlp) feed one linear: written side by side, they need no
concatenation. Knows nothing of what stands in the buffer's other columns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from redux_kernels import checks, dispatch, reference
from redux_kernels.compiler import constexpr, jit, next_power_of_2, tensor, tl
from redux_kernels.device_functions import gelu_tanh
from redux_kernels.registration import operator, register_fake


class ColumnPlan(NamedTuple):
    """How a row's columns are spread over programs."""

    block: int
    warps: int
    grid: tuple[int, int, int]
    """(rows, blocks of columns, batch)."""


@lru_cache(maxsize=1024)
def plan_columns(batch: int, rows: int, width: int) -> ColumnPlan:
    """Elements are independent: 4096 a program with 4 warps is four 128-bit loads a thread."""
    block = min(4096, next_power_of_2(max(width, 16)))
    return ColumnPlan(block, max(1, min(4, block // 256)), (rows, -(-width // block), batch))


@jit
def _gelu_into_kernel(
    mlp_ptr: tensor, out_ptr: tensor, column: tensor,
    mlp_batch: tensor, mlp_row: tensor, out_batch: tensor, out_row: tensor,
    width: constexpr, block: constexpr,
) -> None:  # fmt: skip
    """``block`` columns of one row."""
    col = tl.program_id(1) * block + tl.arange(0, block)
    row = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    mask = col < width
    x = tl.load(mlp_ptr + batch * mlp_batch + row * mlp_row + col, mask=mask, other=0.0)
    y = gelu_tanh(x.to(tl.float32))
    out_ptr += batch * out_batch + row * out_row + column
    tl.store(out_ptr + col, y.to(out_ptr.dtype.element_ty), mask=mask)


def launch(mlp: Tensor, out: Tensor, column: int) -> None:
    """Run the kernel on checked tensors."""
    batch, rows, width = mlp.shape
    plan = plan_columns(batch, rows, width)
    with dispatch.on_device_of(mlp):
        _gelu_into_kernel[plan.grid](
            mlp, out, column, mlp.stride(0), mlp.stride(1), out.stride(0), out.stride(1),
            width=width, block=plan.block, num_warps=plan.warps,
        )  # fmt: skip


def check(mlp: Tensor, out: Tensor, column: int) -> None:
    """Raise ``ValueError`` unless the tensors are those that ``gelu_into`` describes."""
    checks.check_matrix("mlp", mlp)
    checks.check_matrix("out", out)
    checks.check_shape("out", out, (*mlp.shape[:2], out.shape[-1]), "(batch, rows, columns)")
    checks.check_dtype("out", out, mlp.dtype)
    if column < 0 or column + mlp.shape[-1] > out.shape[-1]:
        raise ValueError(
            f"columns {column} to {column + mlp.shape[-1]} do not fit into {out.shape[-1]} of out"
        )
    checks.check_same_device(mlp=mlp, out=out)


@operator("redux::gelu_into", mutates_args=("out",))
def gelu_into(mlp: Tensor, out: Tensor, column: int = 0) -> None:
    """``out[..., column:column + F] = gelu(mlp)``, the tanh form of GELU.

    ``gelu(x) = x / 2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x³)))``, in float32, rounded once.

    Args:
        mlp: (B, S, F), contiguous along F; rows may lie apart, as in the last columns of a wider
            linear's output.
        out: (B, S, columns), contiguous along its columns, in the dtype of ``mlp``, sharing no
            memory with it. Its other columns are left alone.
        column: the first column to write.

    Error: one unit in the last place in bfloat16 and float16, 2e-6 + 1e-5 |x| in float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices are not those above.
    """
    checks.once(check, mlp, out, column)
    if dispatch.runs_kernel("gelu_into", mlp):
        launch(mlp, out, column)
    else:
        reference.gelu_into(mlp, out, column)


@register_fake(gelu_into)
def _(mlp: Tensor, out: Tensor, column: int = 0) -> None:
    check(mlp, out, column)
