"""Attention over groups of keys, each with one number added to its logits.

That number is all that is needed for folded tokens (+ log n), for the strength of a picture
(+ log s) and for rows nobody may see (minus infinity). No implementation builds a mask of queries
by keys: it takes one bias per key, or attends to each group alone and merges exactly. Knows no
implementation (``attention.backends``), no choice among them (``attention.choice``), no network.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from redux_kernels import dispatch
from redux_kernels.merge_groups import MOST_KEYS, MOST_PARTS, merge_groups


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

    On a GPU a kernel merges them; single keys need no call there.
    """

    def attend(
        q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None
    ) -> Tensor:
        merge = merged if dispatch.runs_kernel("merge_groups", q) else _merged_by_torch
        return merge(partial, (q, k, v), groups, into)

    return attend


class _Seen(NamedTuple):
    """Neighbouring keys with one bias that queries see, from ``first`` up to ``end``."""

    first: int
    end: int
    bias: float

    def rows_of(self, x: Tensor) -> Tensor:
        """Those of ``x (B, heads, S, D)``."""
        return x if x.shape[2] == self.end - self.first else x[:, :, self.first : self.end]


def _seen(groups: Groups) -> tuple[tuple[_Seen, ...], tuple[_Seen, ...]]:
    """``_split``, which all blocks of a step ask for the same ``groups``."""
    return _split(groups) if torch.compiler.is_compiling() else _split_once(groups)


def _split(groups: Groups) -> tuple[tuple[_Seen, ...], tuple[_Seen, ...]]:
    """Groups for which ``partial`` is to be called, the largest first, and single keys.

    No more single keys than a kernel takes, and not all groups.
    """
    ends = accumulate(group.rows for group in groups)
    seen = [
        _Seen(end - group.rows, end, group.bias)
        for group, end in zip(groups, ends, strict=True)
        if group.bias != -math.inf
    ]
    seen.sort(key=lambda each: each.first - each.end)
    ones = sum(each.end - each.first == 1 for each in seen)
    count = max(1, len(seen) - min(ones, MOST_KEYS))
    return tuple(seen[:count]), tuple(seen[count:])


_split_once = lru_cache(maxsize=1024)(_split)


def merged(
    partial: Partial,
    qkv: tuple[Tensor, Tensor, Tensor],
    groups: Groups,
    into: Tensor | None = None,
) -> Tensor:
    """Attention by ``partial`` over each group that has several keys, and a kernel's merge of all.

    The kernel takes single keys as they are, and writes the result where it is wanted.
    """
    q, k, v = qkv
    parts, singles = _seen(groups)
    if len(parts) == 1 and not singles:
        return written(partial(q, parts[0].rows_of(k), parts[0].rows_of(v))[0], into)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    biases: list[float] = []
    for part in parts:
        if len(outs) == MOST_PARTS:  # no more are held at once
            joint, joint_lse = torch.empty_like(outs[0]), torch.empty(q.shape[:3], device=q.device)
            merge_groups(outs, lses, biases, q, [], [], [], joint, joint_lse)
            outs, lses, biases = [joint], [joint_lse], [0.0]
        out, lse = partial(q, part.rows_of(k), part.rows_of(v))
        outs.append(out)
        lse = lse.squeeze(-1)
        lses.append(lse.contiguous() if len(parts) > MOST_PARTS else lse)  # like a joint one
        biases.append(part.bias)
    if into is None:  # rows before heads, as the next linear reads them
        batch, heads, rows, width = q.shape
        into = q.new_empty((batch, rows, heads, width)).transpose(1, 2)
    keys, values = ([x[:, :, each.first] for each in singles] for x in (k, v))
    key_biases = [each.bias for each in singles]
    merge_groups(outs, lses, biases, q, keys, values, key_biases, into)
    return into


def _merged_by_torch(
    partial: Partial,
    qkv: tuple[Tensor, Tensor, Tensor],
    groups: Groups,
    into: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, one group after the other."""
    q, k, v = qkv
    out, lse = torch.empty(0), torch.empty(0)
    parts, singles = _seen(groups)
    for index, part in enumerate((*parts, *singles)):
        keys, values = part.rows_of(k), part.rows_of(v)
        attend = _single if part.end - part.first == 1 else partial
        other, other_lse = attend(q, keys, values)
        other_lse = other_lse + part.bias
        if index == 0:
            out, lse = other, other_lse
            continue
        weight = torch.sigmoid(other_lse - lse).to(out.dtype)
        out = torch.addcmul(out, weight, other - out)
        lse = torch.logaddexp(lse, other_lse)
    return written(out, into)


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
