"""The copies of a folded key: ``python bench_merge_folded_key.py --help``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import traffic
from timing import Case, main
from torch import Tensor

from redux_kernels.merge_folded_key import merge_folded_key

HEADS, D = 24, 128
COPIES = 512


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    q = torch.randn(1, HEADS, rows, D, device=device, dtype=torch.bfloat16)
    out = torch.randn(1, rows, HEADS, D, device=device, dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.randn(2, 1, HEADS, D, device=device, dtype=torch.bfloat16)
    lse = 6 + torch.randn(1, HEADS, rows, device=device)

    def replaced() -> Tensor:
        logit = (q.float() * k.float()[:, :, None]).sum(-1) / math.sqrt(D)
        w = torch.sigmoid(logit + math.log(COPIES - 1) - lse)[..., None]
        return (out + w * (v[:, :, None] - out)).to(out.dtype)

    def call() -> Tensor:
        into = torch.empty_like(out)
        merge_folded_key(q, k, v, out, lse, float(COPIES), into)
        return into

    size_bytes = traffic.merge_folded_key(rows, HEADS, D)
    yield Case("merge_folded_key", f"merge_folded_key, {rows} rows", size_bytes, replaced, call)


if __name__ == "__main__":
    main("Time merge_folded_key.", cases)
