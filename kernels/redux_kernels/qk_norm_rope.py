"""RMSNorm and rotary embedding of q and k, from a fused linear's rows to attention's layout.

Replaces per-head norm, rotation, permutation and the concatenation of the text and image streams:
each stream is written into the joint buffers at its own row offset. Knows nothing of attention.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from redux_kernels import checks, dispatch, reference
from redux_kernels.compiler import constexpr, jit, tensor, tl
from redux_kernels.registration import operator, register_fake


class HeadPlan(NamedTuple):
    """How the heads of a row are spread over the steps of its program."""

    heads: int
    """Heads held in registers at a time; divides the number of heads."""
    warps: int
    grid: tuple[int, int]
    """(rows, batch)."""


@lru_cache(maxsize=1024)
def plan_heads(batch: int, rows: int, heads: int, d: int) -> HeadPlan:
    """One program a row, so that an angle is read once for all heads; 8 elements a thread.

    At 24 heads of 128: eight heads at a time and 4 warps. At 4 of 64: all four, 1 warp.
    """
    tile = min(8, heads & -heads)
    return HeadPlan(tile, max(1, min(4, tile * d // 256)), (rows, batch))


@jit
def _norm_and_rotate(
    x: tensor, weight: tensor, cos: tensor, sin: tensor, eps: tensor,
    heads: constexpr, d: constexpr,
) -> tensor:  # fmt: skip
    """RMSNorm of ``heads`` heads along d, then the rotation of the pairs (2i, 2i + 1)."""
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / d + eps)[:, None] * weight.to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(x, (heads, d // 2, 2)))
    turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(turned, (heads, d))


@jit(do_not_specialize=["offset"])
def _qk_norm_rope_kernel(
    qkv_ptr: tensor, q_weight_ptr: tensor, k_weight_ptr: tensor, cos_ptr: tensor, sin_ptr: tensor,
    q_ptr: tensor, k_ptr: tensor, v_ptr: tensor,
    offset: tensor, qkv_batch: tensor, qkv_row: tensor, angle_row: tensor,
    q_batch: tensor, q_head: tensor, q_row: tensor,
    k_batch: tensor, k_head: tensor, k_row: tensor,
    v_batch: tensor, v_head: tensor, v_row: tensor, eps: tensor,
    heads: constexpr, d: constexpr, tile: constexpr, copy_v: constexpr,
) -> None:  # fmt: skip
    """One row of one image: q, k and v of all its heads, ``tile`` heads at a time."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, tile)
    dim = tl.arange(0, d)
    pair = tl.arange(0, d // 2)
    cos = tl.load(cos_ptr + row * angle_row + pair)[None, :]
    sin = tl.load(sin_ptr + row * angle_row + pair)[None, :]
    q_weight = tl.load(q_weight_ptr + dim)
    k_weight = tl.load(k_weight_ptr + dim)

    qkv_ptr += batch * qkv_batch + row * qkv_row
    q_ptr += batch * q_batch + (row + offset) * q_row
    k_ptr += batch * k_batch + (row + offset) * k_row
    v_ptr += batch * v_batch + (row + offset) * v_row
    for first in tl.static_range(0, heads, tile):
        at = (first + head)[:, None] * d + dim[None, :]
        to_head = (first + head)[:, None].to(tl.int64)
        q = tl.load(qkv_ptr + at)
        k = tl.load(qkv_ptr + heads * d + at)
        if copy_v:
            v = tl.load(qkv_ptr + 2 * heads * d + at)
            tl.store(v_ptr + to_head * v_head + dim[None, :], v)
        q = _norm_and_rotate(q, q_weight, cos, sin, eps, tile, d)
        tl.store(q_ptr + to_head * q_head + dim[None, :], q.to(q_ptr.dtype.element_ty))
        k = _norm_and_rotate(k, k_weight, cos, sin, eps, tile, d)
        tl.store(k_ptr + to_head * k_head + dim[None, :], k.to(k_ptr.dtype.element_ty))


def launch(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    q: Tensor, k: Tensor, v: Tensor | None, row_offset: int, eps: float,
) -> None:  # fmt: skip
    """Run the kernel on checked tensors."""
    batch, rows = qkv.shape[:2]
    heads, d = q.shape[1], q.shape[3]
    plan = plan_heads(batch, rows, heads, d)
    v_or_any = k if v is None else v
    with dispatch.on_device_of(qkv):
        _qk_norm_rope_kernel[plan.grid](
            qkv, q_weight, k_weight, cos, sin, q, k, v_or_any,
            row_offset, qkv.stride(0), qkv.stride(1), cos.stride(0),
            *q.stride()[:3], *k.stride()[:3], *v_or_any.stride()[:3], eps,
            heads=heads, d=d, tile=plan.heads, copy_v=v is not None, num_warps=plan.warps,
        )  # fmt: skip


def check(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    q: Tensor, k: Tensor, v: Tensor | None, row_offset: int,
) -> None:  # fmt: skip
    """Raise ``ValueError`` unless the tensors are those that ``qk_norm_rope`` describes."""
    checks.check_matrix("qkv", qkv)
    checks.check_shape("q", q, (qkv.shape[0], *q.shape[1:]), "(batch, heads, total rows, d)")
    batch, heads, total, d = checks.check_heads("q", q)
    checks.check_head_size("q", d)
    checks.check_shape("qkv", qkv, (batch, qkv.shape[1], 3 * heads * d), "(batch, rows, 3 heads d)")
    for name, out in (("q", q), ("k", k), ("v", v)):
        if out is not None:
            checks.check_heads(name, out)
            checks.check_shape(name, out, tuple(q.shape), "like q")
            checks.check_dtype(name, out, qkv.dtype)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        checks.check_float(name, weight)
        checks.check_shape(name, weight, (d,), "(d,)")
        checks.check_last_stride(name, weight)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.check_dtype(name, table, torch.float32)
        checks.check_shape(name, table, (qkv.shape[1], d // 2), "(rows, d / 2)")
        checks.check_last_stride(name, table)
    if cos.stride(0) != sin.stride(0):
        raise ValueError("cos and sin must have the same strides")
    if row_offset < 0 or row_offset + qkv.shape[1] > total:
        raise ValueError(
            f"rows {row_offset} to {row_offset + qkv.shape[1]} do not fit into {total} rows of q"
        )
    checks.check_same_device(qkv=qkv, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin,
                             q=q, k=k, v=v)  # fmt: skip


@operator("redux::qk_norm_rope", mutates_args=("q", "k", "v"))
def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    q: Tensor, k: Tensor, v: Tensor | None, row_offset: int = 0, eps: float = 1e-6,
) -> None:  # fmt: skip
    """Normalise and rotate q and k of fused rows, and write them and v where attention reads them.

    Per head: ``n = x / sqrt(mean(x²) + eps) * weight``; then the pairs turn by the row's angles:
    ``(n[2i] cos[i] - n[2i+1] sin[i], n[2i+1] cos[i] + n[2i] sin[i])``. In float32, rounded once.

    Args:
        qkv: (B, S, 3 heads d), packed as (3, heads, d), contiguous along that axis; rows may lie
            apart, as in the first columns of a wider linear's output.
        q_weight: (d,), the RMSNorm's weight; d is 16, 32, 64, 128 or 256.
        k_weight: as ``q_weight``.
        cos: (S, d/2), float32, contiguous along its last axis: one row per row of ``qkv``.
        sin: as ``cos``, with the same strides.
        q: (B, heads, S_total, d), contiguous along d, in the dtype of ``qkv``; a transposed view of
            (B, S_total, heads, d) is as good. S rows from ``row_offset`` on are written.
        k: as ``q``.
        v: as ``q``; None leaves v where it is, to be read as a view of ``qkv``.
        row_offset: where this stream starts among the rows of ``q``, ``k`` and ``v``.
        eps: added to the mean square.

    Error: one unit in the last place in bfloat16 and float16, 2e-6 + 1e-5 |q| in float32; v is
    copied.

    Raises:
        ValueError: shapes, dtypes, strides or devices are not those above, or the rows do not fit.
    """
    checks.once(check, qkv, q_weight, k_weight, cos, sin, q, k, v, row_offset)
    if dispatch.runs_kernel("qk_norm_rope", qkv):
        launch(qkv, q_weight, k_weight, cos, sin, q, k, v, row_offset, eps)
    else:
        reference.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, q, k, v, row_offset, eps)


@register_fake(qk_norm_rope)
def _(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    q: Tensor, k: Tensor, v: Tensor | None, row_offset: int = 0, eps: float = 1e-6,
) -> None:  # fmt: skip
    check(qkv, q_weight, k_weight, cos, sin, q, k, v, row_offset)


def check_in_place(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> None:
    """Raise ``ValueError`` unless the tensors are those that ``qk_norm_rope_`` describes."""
    check_head_width(qkv, q_weight)
    q, k, _ = heads_of(qkv, q_weight)
    check(qkv, q_weight, k_weight, cos, sin, q, k, None, 0)


def check_head_width(qkv: Tensor, q_weight: Tensor) -> None:
    """A row of ``qkv`` is three times some whole heads."""
    checks.check_matrix("qkv", qkv)
    if q_weight.dim() != 1 or q_weight.shape[0] < 1 or qkv.shape[-1] % (3 * q_weight.shape[0]):
        raise ValueError(
            f"qkv must be (batch, rows, 3 heads d) with q_weight (d,), got {tuple(qkv.shape)} "
            f"and {tuple(q_weight.shape)}"
        )


def heads_of(qkv: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Views ``(B, heads, S, d)`` of queries, keys and values in ``qkv``."""
    d = weight.shape[0]
    parts = qkv.view(*qkv.shape[:2], 3, qkv.shape[2] // (3 * d), d)
    return parts.permute(2, 0, 3, 1, 4).unbind(0)


@operator("redux::qk_norm_rope_", mutates_args=("qkv",))
def qk_norm_rope_(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> None:
    """``qk_norm_rope`` where q and k are: in the rows of ``qkv``; its values stay as they are.

    By the same kernel, and allowed where that is. What is written to a place depends on what was
    read from it, and nothing is read twice: so no thread reads what another has written already.

    Raises:
        ValueError: shapes, dtypes, strides or devices are not those of ``qk_norm_rope``.
    """
    checks.once(check_in_place, qkv, q_weight, k_weight, cos, sin)
    q, k, _ = heads_of(qkv, q_weight)
    run = launch if dispatch.runs_kernel("qk_norm_rope", qkv) else reference.qk_norm_rope
    run(qkv, q_weight, k_weight, cos, sin, q, k, None, 0, eps)


@register_fake(qk_norm_rope_)
def _(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> None:
    check_in_place(qkv, q_weight, k_weight, cos, sin)
