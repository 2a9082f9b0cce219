"""What computes attention: torch's own kernels, ours, oneDNN's products, the flash libraries.

``IMPLEMENTATIONS`` lists them, best first. None is trusted here: ``attention.choice`` tests each
before it is used. Knows no network.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from redux_kernels import dispatch
from redux_kernels.attention import biased_attention
from redux_kernels.self_test import self_test as test_kernels
from redux_pipelines import onednn
from redux_pipelines.attention.flash_libraries import FLASH2, FLASH3, FLASH3_HUB, FLASH4
from redux_pipelines.attention.groups import (
    Capabilities,
    Groups,
    Implementation,
    grouped,
    key_bias,
    written,
)

FEW_KEYS = 512
"""With fewer, blocks gain too little over torch's one call: tried in one and two threads."""

_ATEN = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
_FLOAT = (torch.float32,)
_ALL = (*_HALF, *_FLOAT, torch.float64)
_CUDA, _CPU = ("cuda",), ("cpu",)
_SM80, _SM50 = Capabilities((8, 0)), Capabilities((5, 0))

_QUERIES, _KEYS = 1024, 512
"""Rows of a block of logits, per thread, and its columns: 2 MiB, about a second cache."""
_SAFE = 60.0
"""Powers of two up to this, and their sums over any keys, are far from float32's ends."""
_UNSEEN = -1e30
"""The bias of a key nobody sees: minus infinity, as long as nothing is infinite in between."""
_LOG2_E = math.log2(math.e)
_Block = tuple[Tensor, Tensor, Tensor | None]
"""Keys ``(n, D)``, values ``(D, n)``, and the keys' biases ``(n,)`` in powers of two."""


def biased(q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None) -> Tensor:
    """``scaled_dot_product_attention`` with one bias per key, for all heads and queries.

    torch's CPU kernel reads such a bias at no measurable cost.
    """
    kind = torch.promote_types(q.dtype, torch.float32)  # log 512 in bfloat16 is off by a percent
    bias = key_bias(groups, q.device, kind) if len(groups) > 1 else None  # one on all keys is none
    return written(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), into)


def triton(q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None) -> Tensor:
    """Our own kernel: every group in one launch."""
    bias = key_bias(groups, q.device, torch.float32).flatten()
    return written(biased_attention(q, k, v, bias), into)


def _test_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Let the kernel run if it equals its reference: without it the operator runs the latter."""
    name = "biased_attention"
    test_kernels(device, heads=2, head_dim=head_dim, dtype=dtype, operators=(name,))
    return dispatch.refusal(name, device)


def onednn_blocks(
    q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None
) -> Tensor:
    """By blocks, but ``biased`` where the keys are too few to gain by it."""
    attend = biased if k.shape[2] < FEW_KEYS else attend_in_blocks
    return attend(q, k, v, groups, into)


def _test_onednn(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why oneDNN's blocks do not run there, or None."""
    return onednn.refusal(device, dtype)


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None
) -> Tensor:
    """Attention on a CPU, block by block, in float32 only, without the matrix of all logits.

    Flash attention's algorithm (Dao et al., arXiv:2205.14135) with blocks for a processor's second
    cache. torch's own kernel multiplies through MKL; see ``onednn`` for why that matters. The
    result's rows lie before its heads.
    """
    if into is None:
        into = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        into = into.transpose(1, 2)
    bias = None
    if len(groups) > 1:  # one on all keys is none
        bias = key_bias(groups, q.device, q.dtype).flatten().mul_(_LOG2_E).clamp_(min=_UNSEEN)
    scale = _LOG2_E / math.sqrt(q.shape[-1])
    for image in range(len(q)):
        for head in range(q.shape[1]):
            keys, values = k[image, head].contiguous(), v[image, head].contiguous()
            _attend_head(q[image, head] * scale, keys, values, bias, into[image, head])
    return into


def _attend_head(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, into: Tensor) -> None:
    """``q (Q, D)``, scaled so that weights are powers of two; ``k`` and ``v (S, D)``."""
    keys, values = torch.split(k, _KEYS), [each.t() for each in torch.split(v, _KEYS)]
    biases = [None] * len(keys) if bias is None else torch.split(bias, _KEYS)
    blocks: list[_Block] = list(zip(keys, values, biases, strict=True))
    weigh = _weigh if _largest_logit(q, k, bias) <= _SAFE else _weigh_by_maximum
    at_once = _QUERIES * torch.get_num_threads()
    parts = torch.split(q, at_once), torch.split(into, at_once)
    for queries, target in zip(*parts, strict=True):
        weigh(queries, blocks, target)


def _largest_logit(q: Tensor, k: Tensor, bias: Tensor | None) -> float:
    """No logit is farther from zero (Cauchy and Schwarz), but those of keys nobody sees."""
    bound = torch.linalg.vector_norm(q, dim=-1).max() * torch.linalg.vector_norm(k, dim=-1).max()
    if bias is not None:
        bound = bound + bias.where(bias > _UNSEEN, 0.0).abs().max()
    return float(bound)


def _weigh(q: Tensor, blocks: list[_Block], into: Tensor) -> None:
    """Values weighted by their logits' powers, which are as they are: none is too large."""
    out = total = torch.empty(0)
    for index, (keys, values, bias) in enumerate(blocks):
        weights = onednn.product(q, keys, bias).exp2_()
        sums = weights.sum(-1, keepdim=True)
        if index == 0:
            out, total = onednn.product(weights, values), sums
        else:
            out, total = onednn.add_product(weights, values, out), total.add_(sums)
    torch.div(out, total, out=into)


def _weigh_by_maximum(q: Tensor, blocks: list[_Block], into: Tensor) -> None:
    """As ``_weigh``, for logits of any size: powers are relative to the largest so far."""
    out, total = q.new_zeros(q.shape), q.new_zeros(len(q), 1)
    top = q.new_full((len(q), 1), -math.inf)
    for keys, values, bias in blocks:
        logits = onednn.product(q, keys, bias)
        new_top = torch.maximum(top, logits.amax(-1, keepdim=True))
        shrink = torch.exp2(top.sub_(new_top))
        weights, top = logits.sub_(new_top).exp2_(), new_top
        total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        out = onednn.add_product(weights, values, out.mul_(shrink))
    torch.div(out, total, out=into)


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


IMPLEMENTATIONS = (
    FLASH4,
    FLASH3,
    FLASH3_HUB,
    Implementation("cudnn", grouped(_cudnn), _CUDA, _HALF, 16, _SM80),
    FLASH2,
    Implementation("flash", grouped(_flash_cuda), _CUDA, _HALF, 16, _SM80),
    Implementation("triton", triton, _CUDA, _HALF, 1, _SM80, _test_kernel),
    Implementation("efficient", grouped(_efficient), _CUDA, (*_HALF, *_FLOAT), 16, _SM50),
    Implementation("onednn", onednn_blocks, _CPU, _FLOAT, make_ready=_test_onednn),
    Implementation("biased", biased, _CPU, _ALL),
    Implementation("flash-cpu", grouped(_flash_cpu), _CPU, _ALL),
)
"""Best first. The CPU's order is measured. The GPU's is not: libraries in the order of what their
authors report, then ours, until ``bench_attention.py`` has run on one.
"""
