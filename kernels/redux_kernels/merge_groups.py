"""Attentions over several groups of keys, and over single keys, joined into one over all.

Gives every group a bias of its own (copies of a folded key, a picture's strength, the weights of
pooled tokens) without a mask: attend to each group alone, with an attention that returns its
log-sum-exp, and join them all in one pass. A single key needs no call: its attention is its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from redux_kernels import checks, dispatch, reference
from redux_kernels.compiler import constexpr, jit, tensor, tl
from redux_kernels.registration import operator, register_fake

MOST_PARTS = 5
"""Groups that one call joins: four pictures, and all rows without a bias."""

MOST_KEYS = 2
"""Single keys that one call joins."""


class MergePlan(NamedTuple):
    """Tiles of the rows of one head, and how many parts and keys the kernel is compiled for."""

    rows: int
    warps: int
    grid: tuple[int, int, int]
    """(tiles of rows, heads, batch)."""
    parts: int
    keys: int


@lru_cache(maxsize=1024)
def plan_merge(batch: int, heads: int, rows: int, d: int, parts: int, keys: int) -> MergePlan:
    """4096 elements a program with 4 warps: 32 rows of 128.

    Two binaries serve all counts, so that no request waits for the compiler: what a call does not
    have is masked. The smaller one has room for a folded key, a picture and the rest.
    """
    tile = max(1, 4096 // d)
    slots = (2, 1) if parts <= 2 and keys <= 1 else (MOST_PARTS, MOST_KEYS)
    return MergePlan(tile, 4, (-(-rows // tile), heads, batch), *slots)


@jit(do_not_specialize=["rows", "parts", "keys", "writes_lse", "lse_batch", "lse_head"])
def _merge_groups_kernel(
    outs: tensor, lses: tensor, biases: tensor, q_ptr: tensor, key_ptrs: tensor,
    value_ptrs: tensor, key_biases: tensor, into_ptr: tensor, joint_ptr: tensor,
    rows: tensor, parts: tensor, keys: tensor, writes_lse: tensor,
    out_batch: tensor, out_head: tensor, out_row: tensor, lse_batch: tensor, lse_head: tensor,
    q_batch: tensor, q_head: tensor, q_row: tensor, key_batch: tensor, key_head: tensor,
    value_batch: tensor, value_head: tensor, into_batch: tensor, into_head: tensor,
    into_row: tensor, scale: tensor,
    part_slots: constexpr, key_slots: constexpr, tile: constexpr, d: constexpr,
) -> None:  # fmt: skip
    """``tile`` rows of one head of one image; ``joint`` is contiguous.

    The largest weight is 1 before all are divided by their sum, so that none overflows.
    """
    first = tl.program_id(0).to(tl.int64) * tile
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, tile)
    dim = tl.arange(0, d)
    inside = first + row < rows
    mask = inside[:, None]
    none = float("-inf")

    out_at = batch * out_batch + head * out_head + (first + row)[:, None] * out_row + dim[None, :]
    lse_at = batch * lse_batch + head * lse_head + first + row
    top = tl.load(lses[0] + lse_at, mask=inside, other=0.0) + biases[0]
    for i in tl.static_range(1, part_slots):
        lse = tl.load(lses[i] + lse_at, mask=inside & (i < parts), other=none) + biases[i]
        top = tl.maximum(top, lse)

    q_ptr += batch * q_batch + head * q_head + first * q_row
    q_mask = mask & (keys > 0)
    q = tl.load(q_ptr + row[:, None] * q_row + dim[None, :], mask=q_mask, other=0.0)
    q = q.to(tl.float32) * scale
    key_at = batch * key_batch + head * key_head + dim
    for i in tl.static_range(key_slots):
        key = tl.load(key_ptrs[i] + key_at, mask=(i < keys) & (dim < d), other=0.0).to(tl.float32)
        logit = tl.sum(q * key[None, :], axis=1) + tl.where(i < keys, key_biases[i], none)
        top = tl.maximum(top, logit)

    is_empty = top == none  # no key at all: the first output is kept
    top = tl.where(is_empty, 0.0, top)
    lse = tl.load(lses[0] + lse_at, mask=inside, other=0.0) + biases[0]
    weight = tl.where(is_empty, 1.0, tl.exp(lse - top))
    acc = weight[:, None] * tl.load(outs[0] + out_at, mask=mask, other=0.0).to(tl.float32)
    total = weight
    for i in tl.static_range(1, part_slots):
        lse = tl.load(lses[i] + lse_at, mask=inside & (i < parts), other=none) + biases[i]
        weight = tl.exp(lse - top)
        out = tl.load(outs[i] + out_at, mask=mask & (i < parts), other=0.0).to(tl.float32)
        acc += weight[:, None] * out
        total += weight
    value_at = batch * value_batch + head * value_head + dim
    for i in tl.static_range(key_slots):
        has = (i < keys) & (dim < d)
        key = tl.load(key_ptrs[i] + key_at, mask=has, other=0.0).to(tl.float32)
        logit = tl.sum(q * key[None, :], axis=1) + tl.where(i < keys, key_biases[i], none)
        weight = tl.exp(logit - top)
        value = tl.load(value_ptrs[i] + value_at, mask=has, other=0.0).to(tl.float32)
        acc += weight[:, None] * value[None, :]
        total += weight

    into_ptr += batch * into_batch + head * into_head + first * into_row
    merged = (acc / total[:, None]).to(into_ptr.dtype.element_ty)
    tl.store(into_ptr + row[:, None] * into_row + dim[None, :], merged, mask=mask)
    joint_ptr += (batch * tl.num_programs(1) + head) * rows + first
    joint = tl.where(is_empty, none, top + tl.log(total))
    tl.store(joint_ptr + row, joint, mask=inside & (writes_lse > 0))


def launch(
    outs: Sequence[Tensor], lses: Sequence[Tensor], biases: Sequence[float], q: Tensor,
    keys: Sequence[Tensor], values: Sequence[Tensor], key_biases: Sequence[float],
    into: Tensor, joint_lse: Tensor | None,
) -> None:  # fmt: skip
    """Run the kernel on checked tensors."""
    batch, heads, rows, d = q.shape
    plan = plan_merge(batch, heads, rows, d, len(outs), len(keys))
    first_key, first_value = (keys[0], values[0]) if keys else (q, q)  # masked
    with dispatch.on_device_of(q):
        _merge_groups_kernel[plan.grid](
            _filled(outs, outs[0], plan.parts), _filled(lses, lses[0], plan.parts),
            _filled(biases, 0.0, plan.parts), q, _filled(keys, first_key, plan.keys),
            _filled(values, first_value, plan.keys), _filled(key_biases, 0.0, plan.keys),
            into, lses[0] if joint_lse is None else joint_lse,
            rows, len(outs), len(keys), int(joint_lse is not None),
            *outs[0].stride()[:3], *lses[0].stride()[:2], *q.stride()[:3],
            *first_key.stride()[:2], *first_value.stride()[:2], *into.stride()[:3],
            1 / math.sqrt(d), part_slots=plan.parts, key_slots=plan.keys, tile=plan.rows, d=d,
            num_warps=plan.warps,
        )  # fmt: skip


def _filled(given: Sequence[object], other: object, count: int) -> tuple[object, ...]:
    return (*given, *(other,) * (count - len(given)))


def check(
    outs: Sequence[Tensor], lses: Sequence[Tensor], biases: Sequence[float], q: Tensor,
    keys: Sequence[Tensor], values: Sequence[Tensor], key_biases: Sequence[float],
    into: Tensor, joint_lse: Tensor | None,
) -> None:  # fmt: skip
    """Raise ``ValueError`` unless the arguments are those that ``merge_groups`` describes."""
    _check_counts("outs", MOST_PARTS, outs, lses, biases, least=1)
    _check_counts("keys", MOST_KEYS, keys, values, key_biases, least=0)
    for name, numbers in (("biases", biases), ("key_biases", key_biases)):
        if not all(each < math.inf for each in numbers):  # NaN is not
            raise ValueError(f"{name} must be numbers below infinity, got {list(numbers)}")
    shape = checks.check_heads("into", into)
    checks.check_head_size("into", shape[3])
    checks.check_shape("q", q, shape, "like into")
    checks.check_heads("q", q)
    for name, x in [("outs", each) for each in outs]:
        checks.check_heads(name, x)
        checks.check_shape(name, x, shape, "like into")
        checks.check_dtype(name, x, into.dtype)
    lse_like = [("lses", each) for each in lses]
    if joint_lse is not None:
        lse_like.append(("joint_lse", joint_lse))
        if not joint_lse.is_contiguous():
            raise ValueError("joint_lse must be contiguous: make it with torch.empty")
    for name, x in lse_like:
        checks.check_shape(name, x, shape[:3], "(batch, heads, rows)")
        checks.check_dtype(name, x, torch.float32)
        checks.check_last_stride(name, x)
    for name, x in [("keys", each) for each in keys] + [("values", each) for each in values]:
        checks.check_float(name, x)
        checks.check_shape(name, x, (*shape[:2], shape[3]), "(batch, heads, d)")
        checks.check_last_stride(name, x)
    for name, alike in (("outs", outs), ("lses", lses), ("keys", keys), ("values", values)):
        checks.check_laid_out_alike(name, alike)
    checks.check_same_device(q=q, into=into, **_named("outs", outs), **_named("lses", lses),
                             **_named("keys", keys), **_named("values", values))  # fmt: skip


def _check_counts(name: str, most: int, *lists: Sequence[object], least: int) -> None:
    counts = [len(each) for each in lists]
    if len(set(counts)) > 1 or not least <= counts[0] <= most:
        raise ValueError(
            f"{name}, what belongs to each and their biases must be {least} to {most}, and as "
            f"many: got {counts}"
        )


def _named(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{index}]": each for index, each in enumerate(tensors)}


@operator("redux::merge_groups", mutates_args=("into", "joint_lse"))
def merge_groups(
    outs: Sequence[Tensor], lses: Sequence[Tensor], biases: Sequence[float], q: Tensor,
    keys: Sequence[Tensor], values: Sequence[Tensor], key_biases: Sequence[float],
    into: Tensor, joint_lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention over the keys of all groups, and over single keys, each with a bias of its own.

    With ``l_i = lses[i] + biases[i]`` and, for a single key, ``l_j = q·k_j / sqrt(d) + bias_j``:
    ``into = (sum_i exp(l_i) outs[i] + sum_j exp(l_j) v_j) / (sum_i exp(l_i) + sum_j exp(l_j))``.
    Exact, as ``exp(lse)`` is the sum of the weights in an output. In float32, rounded once.

    n equal keys are one with the bias log n; a group at strength s has the bias log s.

    Args:
        outs: up to 5 of (B, heads, S, d), contiguous along d, d a power of two from 16 to 256:
            attention over one group each. Finite, and all laid out alike.
        lses: of each (B, heads, S), float32, contiguous along S: its natural log-sum-exp without
            its bias; -inf for a row without keys. All laid out alike.
        biases: added to the logits of each group; -inf leaves it out. Numbers, which need no launch
            to write them down: to a compiler that traces this, others are another graph.
        q: (B, heads, S, d), contiguous along d. Not read if there are no ``keys``.
        keys: up to 2 of (B, heads, d), contiguous along d, laid out alike.
        values: as ``keys``.
        key_biases: as ``biases``.
        into: as ``outs``, sharing no memory with the others; a view of a wider buffer's columns,
            transposed, puts the result where the next linear reads it.
        joint_lse: (B, heads, S), float32, contiguous: gets the log-sum-exp over all, to merge more.

    Error, for the given log-sum-exps: of ``into`` one unit in the last place in bfloat16 and
    float16, 2e-6 + 1e-5 |out| in float32; of the log-sum-exp 1e-6 * max(1, |lse|).

    Raises:
        ValueError: shapes, dtypes, strides, devices or counts are not those above.
    """
    checks.once(check, outs, lses, biases, q, keys, values, key_biases, into, joint_lse)
    run = launch if dispatch.runs_kernel("merge_groups", q) else reference.merge_groups
    run(outs, lses, biases, q, keys, values, key_biases, into, joint_lse)


@register_fake(merge_groups)
def _(
    outs: Sequence[Tensor], lses: Sequence[Tensor], biases: Sequence[float], q: Tensor,
    keys: Sequence[Tensor], values: Sequence[Tensor], key_biases: Sequence[float],
    into: Tensor, joint_lse: Tensor | None = None,
) -> None:  # fmt: skip
    check(outs, lses, biases, q, keys, values, key_biases, into, joint_lse)
