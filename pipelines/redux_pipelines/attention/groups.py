"""Attention over groups of keys, each with one number added to its logits.

That number is all that is needed for folded tokens (+ log n), for the strength of a picture
(+ log s) and for rows nobody may see (minus infinity). No implementation builds a mask of queries
by keys: it takes one bias per key, or attends to each group alone and merges exactly. Knows no
implementation (``attention.backends``), no choice among them (``attention.choice``), no network.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from redux_kernels import dispatch
from redux_kernels.merge_folded_key import merge_folded_key


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """``rows`` neighbouring keys whose logits all get ``bias``; at minus infinity none is seen."""

    rows: int
    bias: float


Groups = tuple[KeyGroup, ...]


class Attention(Protocol):
    """``softmax(q·k / √D + bias) · v``."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None
    ) -> Tensor:
        """``q (B, heads, Q, D)``, ``k`` and ``v (B, heads, S, D)`` to ``(B, heads, Q, D)``.

        ``groups`` cover all S keys, in their order; at least one of them is seen. The result is
        written to ``into`` if that is given, which is contiguous along D and holds none of q, k, v.
        """
        ...


Partial = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Attention without biases: the output and the log-sum-exp ``(B, heads, Q, 1)`` of its logits."""


def reference(
    q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None
) -> Tensor:
    """The definition, in float32 at least. It holds all Q × S logits: for small tests only."""
    kind = torch.promote_types(q.dtype, torch.float32)
    bias = key_bias(groups, q.device, kind)
    logits = q.to(kind) @ k.to(kind).transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    return written((logits.softmax(-1) @ v.to(kind)).to(q.dtype), into)


def key_bias(groups: Groups, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The biases written out as ``(1, 1, 1, S)``.

    Made anew for every call: kept in a cache it could be memory of a CUDA graph that is gone.
    """
    bias = torch.zeros(1, 1, 1, sum(group.rows for group in groups), device=device, dtype=dtype)
    end = 0
    for group in groups:
        end += group.rows
        if group.bias != 0.0:
            bias[..., end - group.rows : end] = group.bias
    return bias


def written(out: Tensor, into: Tensor | None) -> Tensor:
    """``out``, copied to ``into`` if that is given: for what cannot write there by itself."""
    return out if into is None else into.copy_(out)


def grouped(partial: Partial) -> Attention:
    """Attention from one ``partial`` call per group, merged by the groups' log-sum-exps.

    On a GPU a folded key in front of the largest group is seen by that group's call, and a kernel
    adds its copies.
    """

    def attend(
        q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None
    ) -> Tensor:
        if is_folded(groups) and dispatch.runs_kernel("merge_folded_key", q):
            return folded(partial, (q, k, v), groups, into)
        parts = _parts(partial, (q, k, v), groups)
        out, lse = next(parts)
        for other, other_lse in parts:
            weight = torch.sigmoid(other_lse - lse).to(out.dtype)
            out = torch.addcmul(out, weight, other - out)
            lse = torch.logaddexp(lse, other_lse)
        return written(out, into)

    return attend


def is_folded(groups: Groups) -> bool:
    """Whether one key that stands for several comes last but for those that are as they are.

    Keys before these may only be unseen ones.
    """
    *hidden, one, others = groups if len(groups) > 1 else (groups[0], groups[0])
    is_one = one.rows == 1 and one.bias > 0.0 == others.bias
    return is_one and all(group.bias == -math.inf for group in hidden)


def folded(
    partial: Partial,
    qkv: tuple[Tensor, Tensor, Tensor],
    groups: Groups,
    into: Tensor | None = None,
) -> Tensor:
    """Attention over groups that are ``is_folded``: one ``partial`` call, then the copies.

    The kernel that adds these writes the result where it is wanted.
    """
    *_, one, others = groups
    first = sum(group.rows for group in groups) - others.rows - 1
    q, k, v = qkv[0], qkv[1][:, :, first:], qkv[2][:, :, first:]
    out, lse = partial(q, k, v)
    if into is None:  # rows before heads, as the next linear reads them
        into = torch.empty_like(out.transpose(1, 2), memory_format=torch.contiguous_format)
        into = into.transpose(1, 2)
    copies = math.exp(one.bias)
    merge_folded_key(q, k[:, :, 0], v[:, :, 0], out, lse.squeeze(-1), copies, into)
    return into


def _parts(
    partial: Partial, qkv: tuple[Tensor, Tensor, Tensor], groups: Groups
) -> Iterator[tuple[Tensor, Tensor]]:
    """Output and biased log-sum-exp of each group that is seen, the largest first."""
    q, k, v = qkv
    ends = accumulate(group.rows for group in groups)
    seen = [pair for pair in zip(groups, ends, strict=True) if pair[0].bias != -math.inf]
    for group, end in sorted(seen, key=lambda pair: -pair[0].rows):
        keys, values = (each[:, :, end - group.rows : end] for each in (k, v))
        out, lse = _single(q, keys, values) if group.rows == 1 else partial(q, keys, values)
        yield out, lse + group.bias


def _single(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``Partial`` in closed form for one key: its value, whatever the query, and its logit."""
    kind = torch.promote_types(q.dtype, torch.float32)  # a logit of 10 in bfloat16 is off by 2 %
    return v.expand_as(q), q.to(kind) @ k.to(kind).transpose(-1, -2) / math.sqrt(q.shape[-1])


@dataclass(frozen=True, slots=True)
class Capabilities:
    """NVIDIA compute capabilities from ``first`` on, to those of ``last_major`` if there is one."""

    first: tuple[int, int]
    last_major: int | None = None

    def __contains__(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this ``(major, minor)`` is among them."""
        is_before = self.last_major is None or capability[0] <= self.last_major
        return self.first <= capability and is_before

    def __str__(self) -> str:
        """As in "needs compute capability 9.0 to 9.x"."""
        least = ".".join(map(str, self.first))
        most = "or higher" if self.last_major is None else f"to {self.last_major}.x"
        return f"{least} {most}"


Readiness = Callable[[torch.device, torch.dtype, int], str | None]
"""Makes an implementation ready for a device, dtype and head_dim: None, or why it cannot be.

May raise anything: that is a reason too.
"""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute attention, and where it can be expected to run.

    ``row_multiple``: the number of rows S it wants a multiple of, for aligned loads.
    ``on_request``: why it is only tried when it is asked for by name, or empty.
    """

    name: str
    attend: Attention
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    row_multiple: int = 1
    capabilities: Capabilities | None = None
    make_ready: Readiness | None = None
    on_request: str = ""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None
    ) -> Tensor:
        """Attend by the function of this implementation."""
        return self.attend(q, k, v, groups, into)

    def unfit(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it is not even tried there, or None. Imports and runs nothing."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device.type}"
        if dtype not in self.dtypes:
            return f"does not take {str(dtype).removeprefix('torch.')}"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "needs a CUDA device, and torch sees none"
        if self.capabilities is not None:
            found = torch.cuda.get_device_capability(device)
            if found not in self.capabilities:
                gpu = f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
                return f"needs compute capability {self.capabilities}, {gpu}"
        return None
