"""Attention with a bias per key: ``python bench_biased_attention.py --help``.

Against what it replaces: torch's flash attention per group of keys, merged by log-sum-exps. Every
attention that a GPU can run is compared by ``pipelines/benchmarks/bench_attention.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import traffic
from timing import Case, main
from torch import Tensor

from redux_kernels.attention import biased_attention
from redux_kernels.merge_groups import merge_groups

HEADS, D = 24, 128
COPIES = 512


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The flash attention of torch, and its log-sum-exp (B, heads, rows)."""
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse.contiguous()


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    """Folded text: the first key counts ``COPIES`` times."""
    qk = torch.randn(1, rows, 2, HEADS, D, device=device, dtype=torch.bfloat16)
    q, k = (each.transpose(1, 2) for each in qk.unbind(2))
    v = torch.randn(1, rows, HEADS, D, device=device, dtype=torch.bfloat16).transpose(1, 2)
    bias = torch.zeros(rows, device=device)
    bias[0] = math.log(COPIES)

    def replaced() -> Tensor:
        out, lse = attend(q, k[:, :, 1:], v[:, :, 1:])
        into = torch.empty_like(out)
        one = [k[:, :, 0]], [v[:, :, 0]], [math.log(COPIES)]
        merge_groups([out], [lse], [0.0], q, *one, into)
        return into

    def call() -> Tensor:
        return biased_attention(q, k, v, bias)

    size_bytes = traffic.biased_attention(rows, rows, HEADS, D)
    tera = 4 * rows * rows * HEADS * D / 1e12
    label = f"biased_attention, {rows} rows, {tera:.2f} TFLOP"
    yield Case("biased_attention", label, size_bytes, replaced, call)


if __name__ == "__main__":
    main("Time biased_attention.", cases)
