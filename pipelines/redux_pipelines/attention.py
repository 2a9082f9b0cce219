"""Attention over groups of keys, each with one number added to its logits.

That number is all that is needed for folded tokens (+ log n), for the strength of a picture
(+ log s) and for rows nobody may see (minus infinity). No implementation builds a mask of queries
by keys. ``choose`` takes the first one that a device can run and that proves itself right.
Knows no network and no tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_ATEN = torch.ops.aten
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """``rows`` neighbouring keys whose logits all get ``bias``; at minus infinity none is seen."""

    rows: int
    bias: float


Groups = tuple[KeyGroup, ...]


class Attention(Protocol):
    """``softmax(q·k / √D + bias) · v``."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
        """``q (B, heads, Q, D)``, ``k`` and ``v (B, heads, S, D)`` to ``(B, heads, Q, D)``.

        ``groups`` cover all S keys, in their order; at least one of them is seen.
        """
        ...


Partial = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Attention without biases: the output and the log-sum-exp ``(B, heads, Q, 1)`` of its logits."""


def reference(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
    """The definition, in float32 at least. It holds all Q × S logits: for small tests only."""
    kind = torch.promote_types(q.dtype, torch.float32)
    bias = key_bias(groups, q.device, kind)
    logits = q.to(kind) @ k.to(kind).transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    return (logits.softmax(-1) @ v.to(kind)).to(q.dtype)


def key_bias(groups: Groups, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The biases written out as ``(1, 1, 1, S)``."""
    spans = [torch.full((group.rows,), group.bias, device=device, dtype=dtype) for group in groups]
    return torch.cat(spans)[None, None, None]


def biased(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
    """``scaled_dot_product_attention`` with one bias per key, for all heads and queries.

    torch's CPU kernel reads such a bias at no measurable cost.
    """
    if len(groups) == 1:  # a bias on all keys is none
        return F.scaled_dot_product_attention(q, k, v)
    kind = torch.promote_types(q.dtype, torch.float32)  # log 512 in bfloat16 is off by a percent
    return F.scaled_dot_product_attention(q, k, v, attn_mask=key_bias(groups, q.device, kind))


def grouped(partial: Partial) -> Attention:
    """Attention from one ``partial`` call per group, merged by the groups' log-sum-exps."""

    def attend(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
        parts = _parts(partial, (q, k, v), groups)
        out, lse = next(parts)
        for other, other_lse in parts:
            weight = torch.sigmoid(other_lse - lse).to(out.dtype)
            out = torch.addcmul(out, weight, other - out)
            lse = torch.logaddexp(lse, other_lse)
        return out

    return attend


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


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse.unsqueeze(-1)


def _flash_cuda(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(q, k, v)
    return out, lse.unsqueeze(-1)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse.view(*q.shape[:-1], 1)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _ATEN._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse[..., : q.shape[2], None]  # the kernel pads its queries


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute attention, and where it can be expected to run.

    ``row_multiple``: the number of rows S it wants a multiple of, for aligned loads.
    """

    name: str
    attend: Attention
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    row_multiple: int = 1

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
        """See ``Attention``."""
        return self.attend(q, k, v, groups)

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot be used, or None: it must exist there and agree with ``reference``."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device.type}"
        if dtype not in self.dtypes:
            return f"does not take {str(dtype).removeprefix('torch.')}"
        try:
            error = self_test(self.attend, device, dtype, head_dim)
        except (RuntimeError, ValueError, AttributeError) as failure:
            return f"failed: {str(failure).splitlines()[0]}"
        if not error <= _TOLERANCE[dtype]:  # NaN is not
            return f"is wrong: relative error {error:.1e}, at most {_TOLERANCE[dtype]:.0e} allowed"
        return None


_HALF = (torch.bfloat16, torch.float16)
_ALL = (*_HALF, torch.float32, torch.float64)

IMPLEMENTATIONS = (
    Implementation("cudnn", grouped(_cudnn), ("cuda",), _HALF, row_multiple=16),
    Implementation("flash", grouped(_flash_cuda), ("cuda",), _HALF, row_multiple=16),
    Implementation(
        "efficient", grouped(_efficient), ("cuda",), (*_HALF, torch.float32), row_multiple=16
    ),
    Implementation("biased", biased, ("cpu",), _ALL),
    Implementation("flash-cpu", grouped(_flash_cpu), ("cpu",), _ALL),
)
"""Best first. The CPU's order is measured, the GPU's is what their authors report."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation taken, and why each one before it was not."""

    attention: Implementation
    refusals: Mapping[str, str]


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    candidates: tuple[Implementation, ...] = IMPLEMENTATIONS,
) -> Choice:
    """Take the first of ``candidates`` that runs and passes its test. ``RuntimeError`` if none."""
    refusals: dict[str, str] = {}
    for candidate in candidates:
        reason = candidate.refusal(device, dtype, head_dim)
        if reason is None:
            return Choice(candidate, refusals)
        refusals[candidate.name] = reason
    told = "; ".join(f"{name} {reason}" for name, reason in refusals.items())
    raise RuntimeError(f"no attention for {dtype} on {device}: {told}")


@torch.inference_mode()
def self_test(attend: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Relative error against ``reference`` over uneven groups, with fewer queries than keys.

    Drawn from a generator of its own. The keys are laid out as the network's are.
    """
    groups = (
        KeyGroup(5, -math.inf),
        KeyGroup(1, math.log(512)),
        KeyGroup(27, math.log(0.3)),
        KeyGroup(67, 0.0),
    )
    rows, generator = sum(group.rows for group in groups), torch.Generator().manual_seed(0)
    qkv = torch.randn(2, rows, 3, 2, head_dim, generator=generator).to(device, dtype)
    q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
    q = q[:, :, 33:]
    kind = torch.promote_types(dtype, torch.float32)
    expected = reference(q.to(kind), k.to(kind), v.to(kind), groups)
    difference = attend(q, k, v, groups).to(kind) - expected
    return float(difference.norm() / expected.norm())
