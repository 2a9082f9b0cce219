"""The operators in plain torch, in float32: what kernels must equal, and what runs on CPUs.

Each function computes in float32 whatever the inputs' dtype, rounds once at the end, and returns
new tensors unless it says that it writes into one. Shapes are checked by the operators, not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
TINY = 1e-12
CACHED_ELEMENTS = 2**16  # what a core's cache keeps between two passes
GPU_ELEMENTS = 2**22  # few launches for a picture, and little memory beside it


def _modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm of the rows of ``x`` (B, S, H) times 1 + ``scale`` plus ``shift``, in float32.

    Both are (B, H), or (H,) for all images.
    """
    h = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return torch.addcmul(shift.float().unsqueeze(-2), h, 1 + scale.float().unsqueeze(-2))


def quantize_rows(h: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 rows, float32 scale of each row), so that rows are about ``q.float() * row_scale``.

    A row's largest magnitude becomes 448. The scale keeps the rows' last axis, with size 1.
    """
    h = h.float()
    row_scale = h.abs().amax(dim=-1, keepdim=True).clamp_min(TINY) * (1 / E4M3_MAX)
    q = (h / row_scale).clamp(-E4M3_MAX, E4M3_MAX)
    return q.to(torch.float8_e4m3fn), row_scale


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm, then ``h * (1 + scale) + shift``, in float32 and rounded once."""
    return _modulated(x, scale, shift, eps).to(x.dtype)


def adaln_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``adaln``, quantised before it is rounded."""
    return quantize_rows(_modulated(x, scale, shift, eps))


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y`` for rows (B, S, H) and a gate (B, H) or (H,), in the dtype of ``x``."""
    return torch.addcmul(x.float(), gate.float().unsqueeze(-2), y.float()).to(x.dtype)


def gate_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The sum, rounded, and ``adaln`` of what was rounded."""
    x = gate_residual(x, y, gate)
    return x, adaln(x, scale, shift, eps)


def gate_residual_adaln_quantize(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The rounded sum, and its ``adaln_quantize``."""
    x = gate_residual(x, y, gate)
    return x, *adaln_quantize(x, scale, shift, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` along the last axis, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[2i], x[2i + 1]) of the last axis by the angles of a (S, d/2) table.

    ``x`` is (B, S, heads, d) in float32.
    """
    even, odd = x.view(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    q: Tensor, k: Tensor, v: Tensor | None, row_offset: int = 0, eps: float = 1e-6,
) -> None:  # fmt: skip
    """Write into ``q``, ``k`` and ``v``; see ``redux_kernels.qk_norm_rope.qk_norm_rope``."""
    heads, d = q.shape[1], q.shape[3]
    parts = qkv.view(*qkv.shape[:2], 3, heads, d).unbind(-3)  # each (B, S, heads, d)
    rows = slice(row_offset, row_offset + qkv.shape[1])
    for part, weight, out in ((parts[0], q_weight, q), (parts[1], k_weight, k)):
        out[:, :, rows] = rotate(rms_norm(part, weight, eps), cos, sin).transpose(1, 2).to(q.dtype)
    if v is not None:
        v[:, :, rows] = parts[2].transpose(1, 2)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, in float32."""
    return F.gelu(x.float(), approximate="tanh")


def gelu_into(mlp: Tensor, out: Tensor, column: int = 0) -> None:
    """Write into ``out``; see ``redux_kernels.gelu_into.gelu_into``."""
    out[..., column : column + mlp.shape[-1]] = gelu(mlp).to(out.dtype)


def gelu_quantize(mlp: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """GELU in float32, and ``beside`` before it, quantised together."""
    h = gelu(mlp)
    return quantize_rows(h if beside is None else torch.cat((beside.float(), h), dim=-1))


def merge_groups(
    outs: Sequence[Tensor], lses: Sequence[Tensor], biases: Sequence[float], q: Tensor,
    keys: Sequence[Tensor], values: Sequence[Tensor], key_biases: Sequence[float],
    into: Tensor, joint_lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Write into ``into``; see ``redux_kernels.merge_groups.merge_groups``."""
    scaled = q.float() / math.sqrt(q.shape[-1])
    logits = [lse + bias for lse, bias in zip(lses, biases, strict=True)]
    for key, bias in zip(keys, key_biases, strict=True):
        logits.append((scaled * key.float()[:, :, None]).sum(dim=-1) + bias)
    every = torch.stack(logits)
    joint = every.logsumexp(dim=0)
    weights = torch.exp(every - torch.where(joint == -math.inf, 0.0, joint))
    weights[0].masked_fill_(joint == -math.inf, 1.0)  # no key at all: the first output is kept
    merged = torch.zeros(into.shape, device=into.device)
    for weight, out in zip(weights, [*outs, *(each[:, :, None] for each in values)], strict=True):
        merged.addcmul_(weight[..., None], out.float())
    into.copy_(merged)
    if joint_lse is not None:
        joint_lse.copy_(joint)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention by torch in float32, with ``bias`` added to each key's logits."""
    q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None, None, None])


def group_norm_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Means and variances ``(B, groups)`` in float32, in two passes over ``x (B, S, C)``."""
    x, (batch, rows, channels) = x.float(), x.shape
    mean = x.mean(1).view(batch, groups, -1).mean(-1)
    centre = mean.repeat_interleave(channels // groups, dim=1)[:, None]
    squares = torch.zeros_like(centre[:, 0])
    elements = GPU_ELEMENTS if x.is_cuda else CACHED_ELEMENTS
    for part in torch.split(x, max(1, elements // channels), dim=1):
        squares += (part - centre).square_().sum(1)
    return mean, squares.view(batch, groups, -1).mean(-1) / rows


def group_norm_silu(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> Tensor:
    """GroupNorm of ``x (B, S, C)`` with given statistics, then SiLU.

    One multiplication and one addition an element, as torch's GroupNorm on a CPU: where a mean is
    many standard deviations off zero, the kernel, which takes it off first, rounds less.
    """
    width = x.shape[-1] // mean.shape[1]
    scale = (var + eps).rsqrt().repeat_interleave(width, dim=1) * weight.float()
    shift = bias.float() - mean.repeat_interleave(width, dim=1) * scale
    y = torch.addcmul(shift[:, None], x.float(), scale[:, None])
    return F.silu(y, inplace=True).to(x.dtype)
