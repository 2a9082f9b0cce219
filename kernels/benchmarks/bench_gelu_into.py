"""GELU into a shared buffer, against GELU and ``cat``: ``python bench_gelu_into.py --help``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import traffic
from timing import Case, main
from torch import Tensor

from redux_kernels.gelu_into import gelu_into

WIDTH = 3072


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    """A double block's GELU alone; a single block's beside attention, which is there already."""
    linear1 = torch.randn(1, rows, 7 * WIDTH, device=device, dtype=torch.bfloat16)
    attention, mlp = torch.randn_like(linear1[..., :WIDTH]), linear1[..., 3 * WIDTH :]
    up, both = mlp.contiguous(), linear1.new_empty((1, rows, 5 * WIDTH))
    both[..., :WIDTH] = attention

    def concatenated() -> Tensor:
        return torch.cat((attention, F.gelu(mlp, approximate="tanh")), dim=-1)

    def alone() -> Tensor:
        out = torch.empty_like(up)
        gelu_into(up, out)
        return out

    def beside() -> Tensor:
        gelu_into(mlp, both, WIDTH)
        return both

    size_bytes = traffic.gelu_into(rows, 4 * WIDTH)
    yield Case("gelu_into", f"gelu_into alone, {rows} rows", size_bytes,
               lambda: F.gelu(up, approximate="tanh"), alone)  # fmt: skip
    yield Case("gelu_into", f"gelu_into beside attention, {rows} rows", size_bytes,
               concatenated, beside)  # fmt: skip


if __name__ == "__main__":
    main("Time gelu_into.", cases)
