"""Attention on a CPU through oneDNN's products, block by block, without the matrix of all logits.

Flash attention's algorithm (Dao et al., arXiv:2205.14135) with blocks for a processor's second
cache. torch's own kernel multiplies through MKL; see ``onednn`` for why that matters. Knows no
network.
"""

import math

import torch
from torch import Tensor

from redux_pipelines import onednn
from redux_pipelines.attention import Groups, key_bias

_QUERIES, _KEYS = 1024, 512
"""Rows of a block of logits, per thread, and its columns: 2 MiB, about a second cache."""

FEW_KEYS = 512
"""With fewer, our several calls gain too little over torch's one: tried in one and two threads."""

_SAFE = 60.0
"""Powers of two up to this, and their sums over any keys, are far from float32's ends."""

_UNSEEN = -1e30
"""The bias of a key nobody sees: minus infinity, as long as nothing is infinite in between."""

_LOG2_E = math.log2(math.e)

_Block = tuple[Tensor, Tensor, Tensor | None]
"""Keys ``(n, D)``, values ``(D, n)``, and the keys' biases ``(n,)`` in powers of two."""


def attend(q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None) -> Tensor:
    """See ``Attention``. float32 only; the result's rows lie before its heads."""
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
    for queries, place in zip(*parts, strict=True):
        weigh(queries, blocks, place)


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
