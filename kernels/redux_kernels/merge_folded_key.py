"""The copies of one key, added to attention that has seen the key once.

Equal tokens stay equal through every block, so that n of them can be computed as one, if attention
counts the key n times. This adds the missing n - 1 in closed form after any attention that returns
its log-sum-exp: no mask, no bias inside the attention kernel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from redux_kernels import checks, dispatch, reference
from redux_kernels.compiler import constexpr, jit, tensor, tl


class HeadRowsPlan(NamedTuple):
    """Tiles of the rows of one head."""

    rows: int
    warps: int
    grid: tuple[int, int, int]
    """(tiles of rows, heads, batch)."""


def plan_head_rows(batch: int, heads: int, rows: int, d: int) -> HeadRowsPlan:
    """4096 elements a program with 4 warps: 32 rows of 128."""
    tile = max(1, 4096 // d)
    return HeadRowsPlan(tile, 4, (-(-rows // tile), heads, batch))


@jit(do_not_specialize=["rows", "lse_batch", "lse_head"])
def _merge_folded_key_kernel(
    q_ptr: tensor, k_ptr: tensor, v_ptr: tensor, out_ptr: tensor, lse_ptr: tensor,
    into_ptr: tensor, rows: tensor,
    q_batch: tensor, q_head: tensor, q_row: tensor, k_batch: tensor, k_head: tensor,
    v_batch: tensor, v_head: tensor, out_batch: tensor, out_head: tensor, out_row: tensor,
    lse_batch: tensor, lse_head: tensor,
    into_batch: tensor, into_head: tensor, into_row: tensor, more: tensor, scale: tensor,
    tile: constexpr, d: constexpr,
) -> None:  # fmt: skip
    """``tile`` rows of one head of one image."""
    first = tl.program_id(0).to(tl.int64) * tile
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, tile)
    dim = tl.arange(0, d)
    inside = first + row < rows
    mask = inside[:, None]

    q_ptr += batch * q_batch + head * q_head + first * q_row
    out_ptr += batch * out_batch + head * out_head + first * out_row
    into_ptr += batch * into_batch + head * into_head + first * into_row
    q = tl.load(q_ptr + row[:, None] * q_row + dim[None, :], mask=mask, other=0.0)
    out = tl.load(out_ptr + row[:, None] * out_row + dim[None, :], mask=mask, other=0.0)
    lse_ptr += batch * lse_batch + head * lse_head + first
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + batch * k_batch + head * k_head + dim).to(tl.float32)
    v = tl.load(v_ptr + batch * v_batch + head * v_head + dim).to(tl.float32)

    logit = tl.sum(q.to(tl.float32) * k[None, :], axis=1) * scale + more
    w = tl.sigmoid(logit - lse)[:, None]
    out = out.to(tl.float32)
    merged = out + w * (v[None, :] - out)
    at = row[:, None] * into_row + dim[None, :]
    tl.store(into_ptr + at, merged.to(into_ptr.dtype.element_ty), mask=mask)


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, copies: float, into: Tensor
) -> None:
    """Run the kernel on checked tensors."""
    batch, heads, rows, d = q.shape
    plan = plan_head_rows(batch, heads, rows, d)
    more = reference.log_of_more(copies)
    with dispatch.on_device_of(q):
        _merge_folded_key_kernel[plan.grid](
            q, k, v, out, lse, into, rows,
            *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *out.stride()[:3],
            *lse.stride()[:2], *into.stride()[:3],
            more, 1 / math.sqrt(d), tile=plan.rows, d=d, num_warps=plan.warps,
        )  # fmt: skip


def check(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, copies: float, into: Tensor
) -> None:
    """Raise ``ValueError`` unless the tensors are those that ``merge_folded_key`` describes."""
    batch, heads, _, d = checks.check_heads("q", q)
    checks.check_attention(out, lse, into)
    checks.check_shape("q", q, tuple(out.shape), "like out")
    for name, x in (("k", k), ("v", v)):
        checks.check_float(name, x)
        checks.check_shape(name, x, (batch, heads, d), "(batch, heads, d)")
        checks.check_last_stride(name, x)
    if not copies >= 1:  # NaN is not
        raise ValueError(f"copies must be at least 1, got {copies}")
    checks.check_same_device(q=q, k=k, v=v, out=out, lse=lse, into=into)


@torch.library.custom_op("redux::merge_folded_key", mutates_args=("into",))
def merge_folded_key(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, copies: float, into: Tensor
) -> None:
    """Attention over a key that stands for ``copies`` equal ones, from attention over it once.

    ``into = out + w (v - out)`` with ``w = sigmoid(q·k / sqrt(d) + log(copies - 1) - lse)``: exact,
    as ``exp(lse)`` is the sum of the weights in ``out`` and ``(copies - 1) exp(q·k / sqrt(d))``
    that of the copies left out. In float32, rounded once.

    Args:
        q: (B, heads, S, d), contiguous along d, d a power of two from 16 to 256.
        k: (B, heads, d), the folded key, contiguous along d.
        v: (B, heads, d), its value.
        out: (B, heads, S, d), contiguous along d: attention over all keys, the folded one once.
        lse: (B, heads, S), float32, contiguous along S: its natural log-sum-exp.
        copies: n >= 1, not necessarily whole; 1 gives ``out``. A number, which needs no launch to
            write it down: to a compiler that traces this, another n is another graph.
        into: as ``out``, sharing no memory with the others; a view of a wider buffer's columns,
            transposed, puts the result where the next linear reads it.

    Error, for the given ``lse``: one unit in the last place in bfloat16 and float16,
    2e-6 + 1e-5 |out| in float32.

    Raises:
        ValueError: shapes, dtypes, strides, devices or the number are not those above.
    """
    check(q, k, v, out, lse, copies, into)
    if dispatch.runs_kernel("merge_folded_key", q):
        launch(q, k, v, out, lse, copies, into)
    else:
        reference.merge_folded_key(q, k, v, out, lse, copies, into)


@merge_folded_key.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, copies: float, into: Tensor
) -> None:
    check(q, k, v, out, lse, copies, into)
