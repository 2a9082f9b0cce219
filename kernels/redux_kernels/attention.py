"""Attention with one number per key added to its logits, for all groups of keys in one launch.

Folded tokens (+ log n), a picture's strength (+ log s) and rows that nobody may see (-inf) are all
such numbers, so nothing needs merging. Not measured: whether it beats cuDNN or a flash attention
per group and a merge only a GPU can tell (``bench_biased_attention.py``), and if it beats neither
it is to be deleted. Knows nothing of groups.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from redux_kernels import checks, dispatch, reference
from redux_kernels.compiler import constexpr, jit, tensor, tl
from redux_kernels.registration import operator, register_fake

LOG2_E = math.log2(math.e)


class AttentionPlan(NamedTuple):
    """Tiles of queries, a program each, and of keys, which a program passes one after the other."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Tiles of keys and values in shared memory at a time."""
    grid: tuple[int, int, int]
    """(tiles of queries, heads, batch)."""


@lru_cache(maxsize=1024)
def plan_attention(batch: int, heads: int, queries: int, d: int, element: int) -> AttentionPlan:
    """At d = 128 in 2 bytes: 128 queries by 32 keys, 8 warps, three stages.

    That takes 80 KiB of shared memory at most, of the 99 that sm_86, sm_89 and sm_120 have; 64 keys
    would spill registers on sm_120. Narrower rows get more keys, wider ones fewer of both.
    """
    row_bytes = d * element
    tile = min(128, max(16, 128 * 256 // row_bytes))
    keys = min(64, max(16, 32 * 256 // row_bytes))
    return AttentionPlan(tile, keys, 8, 3, (-(-queries // tile), heads, batch))


@jit(do_not_specialize=["queries", "keys"])
def _biased_attention_kernel(
    q_ptr: tensor, k_ptr: tensor, v_ptr: tensor, bias_ptr: tensor, out_ptr: tensor,
    queries: tensor, keys: tensor,
    q_batch: tensor, q_head: tensor, q_row: tensor, k_batch: tensor, k_head: tensor, k_row: tensor,
    v_batch: tensor, v_head: tensor, v_row: tensor,
    out_batch: tensor, out_head: tensor, out_row: tensor, scale: tensor,
    tile: constexpr, key_tile: constexpr, d: constexpr,
) -> None:  # fmt: skip
    """``tile`` queries of one head of one image: a softmax over all keys that is never whole.

    With m the largest logit so far, sums of 2^(logit - m) v and 2^(logit - m) are kept in float32
    and shrunk when m grows; their quotient is the result.
    """
    first = tl.program_id(0).to(tl.int64) * tile
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, tile)
    key = tl.arange(0, key_tile)
    dim = tl.arange(0, d)
    mask = (first + row < queries)[:, None]

    q_ptr += batch * q_batch + head * q_head + first * q_row
    q = tl.load(q_ptr + row[:, None] * q_row + dim[None, :], mask=mask, other=0.0)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    k_at = key[:, None] * k_row + dim[None, :]
    v_at = key[:, None] * v_row + dim[None, :]

    acc = tl.zeros((tile, d), dtype=tl.float32)
    total = tl.zeros((tile,), dtype=tl.float32)
    top = tl.full((tile,), float("-inf"), dtype=tl.float32)
    for start in range(0, keys, key_tile):
        inside = key < keys - start
        k = tl.load(k_ptr + k_at, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + v_at, mask=inside[:, None], other=0.0)
        bias = tl.load(bias_ptr + key, mask=inside, other=float("-inf"))
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits += (bias * 1.4426950408889634)[None, :]
        higher = tl.maximum(top, tl.max(logits, axis=1))
        origin = tl.where(higher == float("-inf"), 0.0, higher)  # no key seen yet
        weights = tl.exp2(logits - origin[:, None])
        shrink = tl.exp2(top - origin)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
        k_ptr += key_tile * k_row
        v_ptr += key_tile * v_row
        bias_ptr += key_tile

    out = acc / total[:, None]
    out_ptr += batch * out_batch + head * out_head + first * out_row
    at = row[:, None] * out_row + dim[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def launch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor) -> None:
    """Run the kernel on checked tensors."""
    batch, heads, queries, d = q.shape
    plan = plan_attention(batch, heads, queries, d, q.element_size())
    with dispatch.on_device_of(q):
        _biased_attention_kernel[plan.grid](
            q, k, v, bias, out, queries, k.shape[2],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            LOG2_E / math.sqrt(d), tile=plan.queries, key_tile=plan.keys, d=d,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip


def check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> None:
    """Raise ``ValueError`` unless the tensors are those that ``biased_attention`` describes."""
    batch, heads, _, d = checks.check_heads("q", q)
    checks.check_head_size("q", d)
    _, _, keys, _ = checks.check_heads("k", k)
    for name, x in (("k", k), ("v", v)):
        checks.check_heads(name, x)
        checks.check_shape(name, x, (batch, heads, keys, d), "(batch, heads, keys, d)")
        checks.check_dtype(name, x, q.dtype)
    checks.check_dtype("bias", bias, torch.float32)
    checks.check_shape("bias", bias, (keys,), "(keys,)")
    checks.check_last_stride("bias", bias)
    checks.check_same_device(q=q, k=k, v=v, bias=bias)


def empty_out(q: Tensor) -> Tensor:
    """Room like ``q`` whose rows come before its heads in memory, as a linear reads them."""
    batch, heads, queries, d = q.shape
    return q.new_empty((batch, queries, heads, d)).transpose(1, 2)


@operator("redux::biased_attention", mutates_args=())
def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``softmax(q·k / sqrt(d) + bias) · v`` with one bias per key, for all heads and queries.

    Flash attention (Dao et al., arXiv:2205.14135, 2307.08691) with the bias read beside the keys:
    logits and sums in float32, weights rounded to the dtype of ``v`` for the second product.

    Args:
        q: (B, heads, Q, d), contiguous along d, d a power of two from 16 to 256; bfloat16, float16
            or float32. Heads and rows may lie in any order.
        k: (B, heads, S, d), of the dtype of ``q``; finite, even where no query sees it.
        v: as ``k``.
        bias: (S,), float32: added to the logits of each key; -inf where no query may see it.
            A tensor, so that another weight needs no other graph. At least one key is seen.

    Returns:
        (B, heads, Q, d) in the dtype of ``q``; its rows come before its heads in memory.
        Error: 2^-8 of the largest |v| in bfloat16, 2^-10 in float16; 1e-5 in float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices are not those above.
    """
    checks.once(check, q, k, v, bias)
    out = empty_out(q)
    if dispatch.runs_kernel("biased_attention", q):
        launch(q, k, v, bias, out)
    else:
        out.copy_(reference.biased_attention(q, k, v, bias))
    return out


@register_fake(biased_attention)
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    check(q, k, v, bias)
    return empty_out(q)
