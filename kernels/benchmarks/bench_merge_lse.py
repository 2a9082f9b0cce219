"""Two attentions joined by their log-sum-exps: ``python bench_merge_lse.py --help``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import traffic
from timing import Case, main
from torch import Tensor

from redux_kernels.merge_lse import merge_lse

HEADS, D = 24, 128
BIAS = -0.5


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    a, b = torch.randn(2, 1, rows, HEADS, D, device=device, dtype=torch.bfloat16).transpose(2, 3)
    bias = torch.full((1,), BIAS, device=device)
    lse_a, lse_b = torch.randn(2, 1, HEADS, rows, device=device)

    def replaced() -> tuple[Tensor, Tensor]:
        w = torch.sigmoid(lse_b + BIAS - lse_a)[..., None]
        return (a + w * (b - a)).to(a.dtype), torch.logaddexp(lse_a, lse_b + BIAS)

    def call() -> tuple[Tensor, Tensor]:
        into = torch.empty_like(a)
        return into, merge_lse(a, lse_a, b, lse_b, bias, into)

    size_bytes = traffic.merge_lse(rows, HEADS, D)
    yield Case("merge_lse", f"merge_lse, {rows} rows", size_bytes, replaced, call)


if __name__ == "__main__":
    main("Time merge_lse.", cases)
