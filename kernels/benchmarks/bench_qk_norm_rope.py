"""RMSNorm, rotation and layout of q, k and v: ``python bench_qk_norm_rope.py --help``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import traffic
from timing import Case, main
from torch import Tensor

from redux_kernels.qk_norm_rope import qk_norm_rope

HEADS, D = 24, 128
EPS = 1e-6


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    """Text is a fifth of the rows, its own linear's output; both streams go into one buffer."""
    split = rows // 5
    streams = [
        torch.randn(1, each, 3 * HEADS * D, device=device, dtype=torch.bfloat16)
        for each in (split, rows - split)
    ]
    weights = 1 + torch.randn(2, D, device=device, dtype=torch.bfloat16) / 10
    angles = torch.randn(rows, D // 2, device=device)
    cos, sin = angles.cos(), angles.sin()

    def rotated(x: Tensor) -> Tensor:
        even, odd = x.float().unflatten(-1, (D // 2, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    def replaced() -> tuple[Tensor, Tensor, Tensor]:
        parts = [x.unflatten(-1, (3, HEADS, D)).unbind(-3) for x in streams]
        q, k = (
            torch.cat([F.rms_norm(part[i], (D,), weights[i], EPS) for part in parts], dim=1)
            for i in range(2)
        )
        q, k = (rotated(x.transpose(1, 2)).to(x.dtype) for x in (q, k))
        return q, k, torch.cat([part[2] for part in parts], dim=1).transpose(1, 2).contiguous()

    def call() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (streams[0].new_empty((1, HEADS, rows, D)) for _ in range(3))
        first = 0
        for x in streams:
            last = first + x.shape[1]
            qk_norm_rope(x, *weights, cos[first:last], sin[first:last], q, k, v, first, EPS)
            first = last
        return q, k, v

    size_bytes = traffic.qk_norm_rope(rows, HEADS, D)
    yield Case(
        "qk_norm_rope", f"qk_norm_rope, {rows} rows in 2 streams", size_bytes, replaced, call
    )


if __name__ == "__main__":
    main("Time qk_norm_rope.", cases)
