"""Quantisation of rows to e4m3, on its own: for a linear in fp8 whose input no other kernel makes.

In FLUX's blocks that is attention's output before a double block's projections. Reads each row
once; knows nothing of what made it.
"""

from __future__ import annotations

from torch import Tensor

from redux_kernels import checks, dispatch, reference
from redux_kernels.adaln import plan_rows
from redux_kernels.compiler import constexpr, jit, tensor, tl
from redux_kernels.device_functions import scale_of_rows
from redux_kernels.registration import operator, register_fake


@jit(do_not_specialize=["rows"])
def _quantize_rows_kernel(
    x_ptr: tensor, q_ptr: tensor, row_scale_ptr: tensor,
    rows: tensor, x_batch: tensor, x_row: tensor,
    width: constexpr, tile: constexpr, block: constexpr,
) -> None:  # fmt: skip
    """``tile`` rows of one image; ``q`` and ``row_scale`` are contiguous."""
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * tile
    row = tl.arange(0, tile)
    col = tl.arange(0, block)
    inside = first + row < rows
    mask = inside[:, None] & (col < width)[None, :]

    x_ptr += batch * x_batch + first.to(tl.int64) * x_row
    x = tl.load(x_ptr + row[:, None] * x_row + col[None, :], mask=mask, other=0.0).to(tl.float32)
    row_scale = scale_of_rows(tl.max(tl.abs(x), axis=1))

    out_row = batch * rows + first
    tl.store(row_scale_ptr + out_row + row, row_scale, mask=inside)
    q = (x / row_scale[:, None]).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + out_row * width + row[:, None] * width + col[None, :], q, mask=mask)


def launch(x: Tensor, q: Tensor, row_scale: Tensor) -> None:
    """Run the kernel on checked tensors, into ``q`` and ``row_scale``."""
    batch, rows, width = x.shape
    plan = plan_rows(batch, rows, width)
    with dispatch.on_device_of(x):
        _quantize_rows_kernel[plan.grid](
            x, q, row_scale, rows, x.stride(0), x.stride(1),
            width=width, tile=plan.rows, block=plan.block, num_warps=plan.warps,
        )  # fmt: skip


def check(x: Tensor, q: Tensor, row_scale: Tensor) -> None:
    """Raise ``ValueError`` unless the tensors are those that ``quantize_rows`` describes."""
    checks.check_rows("x", x)
    checks.check_quantized(x, x.shape[-1], q, row_scale)


@operator("redux::quantize_rows", mutates_args=("q", "row_scale"))
def quantize_rows(x: Tensor, q: Tensor, row_scale: Tensor) -> None:
    """Quantise rows to e4m3, so that ``x`` is about ``q * row_scale``.

    ``row_scale = max|x| / 448`` over each row and ``q = round(x / row_scale)``, in float32: what a
    row-wise scaled matrix product (``torch._scaled_mm``) takes.

    Args:
        x: (B, S, H), H <= 16384, contiguous along H; images and rows may lie apart.
        q: (B·S, H), contiguous, float8_e4m3fn: gets the rows, image by image.
        row_scale: (B·S, 1), contiguous, float32: gets their scales.

    Error: half a step of e4m3 (2^-4 relative, 2^-10 * row_scale absolute); where ``x`` lies on
        the border between two numbers the kernel and the reference may choose differently.

    Raises:
        ValueError: shapes, dtypes, strides or devices are not those above.
    """
    checks.once(check, x, q, row_scale)
    if dispatch.runs_kernel("quantize_rows", x):
        launch(x, q, row_scale)
    else:
        checks.write_quantized(reference.quantize_rows(x), q, row_scale)


@register_fake(quantize_rows)
def _(x: Tensor, q: Tensor, row_scale: Tensor) -> None:
    check(x, q, row_scale)
