"""Two attentions over two groups of keys, joined into one over both.

Gives a whole group of keys a bias (Redux tokens at a strength, a weight per reference image)
without a mask: attend to each group alone, then join by their log-sum-exps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redux_kernels import checks, dispatch, reference
from redux_kernels.compiler import constexpr, jit, tensor, tl
from redux_kernels.merge_folded_key import plan_head_rows


@jit(
    do_not_specialize=[
        "rows",
        "lse_a_batch",
        "lse_a_head",
        "lse_b_batch",
        "lse_b_head",
        "bias_batch",
    ]
)
def _merge_lse_kernel(
    a_ptr: tensor, lse_a_ptr: tensor, b_ptr: tensor, lse_b_ptr: tensor,
    bias_ptr: tensor, into_ptr: tensor, lse_ptr: tensor, rows: tensor,
    a_batch: tensor, a_head: tensor, a_row: tensor, lse_a_batch: tensor, lse_a_head: tensor,
    b_batch: tensor, b_head: tensor, b_row: tensor, lse_b_batch: tensor, lse_b_head: tensor,
    into_batch: tensor, into_head: tensor, into_row: tensor, bias_batch: tensor,
    tile: constexpr, d: constexpr,
) -> None:  # fmt: skip
    """``tile`` rows of one head of one image; ``lse`` is contiguous."""
    first = tl.program_id(0).to(tl.int64) * tile
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, tile)
    dim = tl.arange(0, d)
    inside = first + row < rows
    mask = inside[:, None]

    a_ptr += batch * a_batch + head * a_head + first * a_row
    b_ptr += batch * b_batch + head * b_head + first * b_row
    into_ptr += batch * into_batch + head * into_head + first * into_row
    a = tl.load(a_ptr + row[:, None] * a_row + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row[:, None] * b_row + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    lse_a_ptr += batch * lse_a_batch + head * lse_a_head + first
    lse_b_ptr += batch * lse_b_batch + head * lse_b_head + first
    lse_a = tl.load(lse_a_ptr + row, mask=inside, other=0.0)
    lse_b = tl.load(lse_b_ptr + row, mask=inside, other=0.0)
    lse_b += tl.load(bias_ptr + batch * bias_batch)

    top = tl.maximum(lse_a, lse_b)
    none = top == float("-inf")  # no keys at all: keep a, and no weight
    top = tl.where(none, 0.0, top)
    weight_a = tl.exp(lse_a - top)
    weight_b = tl.exp(lse_b - top)
    total = weight_a + weight_b
    w = tl.where(none, 0.0, weight_b / tl.where(none, 1.0, total))[:, None]
    merged = a + w * (b - a)
    at = row[:, None] * into_row + dim[None, :]
    tl.store(into_ptr + at, merged.to(into_ptr.dtype.element_ty), mask=mask)
    lse_ptr += (batch * tl.num_programs(1) + head) * rows + first
    tl.store(lse_ptr + row, top + tl.log(total), mask=inside)


def launch(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, bias_b: Tensor, into: Tensor
) -> Tensor:
    """Run the kernel on checked tensors: the joint log-sum-exp."""
    batch, heads, rows, d = out_a.shape
    plan = plan_head_rows(batch, heads, rows, d)
    lse = lse_a.new_empty((batch, heads, rows))
    with dispatch.on_device_of(out_a):
        _merge_lse_kernel[plan.grid](
            out_a, lse_a, out_b, lse_b, bias_b, into, lse, rows,
            *out_a.stride()[:3], *lse_a.stride()[:2], *out_b.stride()[:3], *lse_b.stride()[:2],
            *into.stride()[:3], bias_b.stride(0), tile=plan.rows, d=d, num_warps=plan.warps,
        )  # fmt: skip
    return lse


def check(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, bias_b: Tensor, into: Tensor
) -> None:
    """Raise ``ValueError`` unless the tensors are those that ``merge_lse`` describes."""
    checks.check_attention(out_a, lse_a, into)
    checks.check_attention(out_b, lse_b, into)
    checks.check_dtype("bias_b", bias_b, torch.float32)
    checks.check_shape("bias_b", bias_b, (out_a.shape[0],), "(batch,)")
    checks.check_same_device(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b, bias_b=bias_b,
                             into=into)  # fmt: skip


@torch.library.custom_op("redux::merge_lse", mutates_args=("into",))
def merge_lse(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, bias_b: Tensor, into: Tensor
) -> Tensor:
    """Attention over the keys of a and b, those of b with ``bias_b`` added to their logits.

    ``into = out_a + w (out_b - out_a)`` with ``w = sigmoid(lse_b + bias_b - lse_a)``, and the joint
    log-sum-exp ``log(exp(lse_a) + exp(lse_b + bias_b))``. In float32, rounded once.

    Args:
        out_a: (B, heads, S, d), contiguous along d, d a power of two from 16 to 256; finite.
        lse_a: (B, heads, S), float32, contiguous along S; -inf for a row without keys.
        out_b: as ``out_a``.
        lse_b: as ``lse_a``.
        bias_b: (B,), float32: the log of the group's weight in each image; -inf leaves b out. A
            tensor, so that another weight needs no other graph.
        into: as ``out_a``, sharing no memory with the others; may be a transposed view of a wider
            buffer's columns.

    Returns:
        (B, heads, S), float32, contiguous: the joint log-sum-exp, to merge a third group.
        Error: of ``into`` one unit in the last place in bfloat16 and float16, 2e-6 + 1e-5 |out| in
        float32; of the log-sum-exp 1e-6 * max(1, |lse|).

    Raises:
        ValueError: shapes, dtypes, strides or devices are not those above.
    """
    check(out_a, lse_a, out_b, lse_b, bias_b, into)
    if dispatch.runs_kernel("merge_lse", out_a):
        return launch(out_a, lse_a, out_b, lse_b, bias_b, into)
    return reference.merge_lse(out_a, lse_a, out_b, lse_b, bias_b, into)


@merge_lse.register_fake
def _(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, bias_b: Tensor, into: Tensor
) -> Tensor:
    check(out_a, lse_a, out_b, lse_b, bias_b, into)
    return torch.empty_like(lse_a, memory_format=torch.contiguous_format)
