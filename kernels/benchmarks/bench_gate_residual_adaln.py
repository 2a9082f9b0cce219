"""Gated residual and the next norm: ``python bench_gate_residual_adaln.py --help``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import traffic
from timing import Case, main
from torch import Tensor

from redux_kernels import checks, reference
from redux_kernels.gate_residual_adaln import gate_residual_adaln, gate_residual_adaln_quantize

WIDTH = 3072


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    x, y = torch.randn(2, 1, rows, WIDTH, device=device, dtype=torch.bfloat16)
    room = checks.empty_quantized(x, WIDTH)
    table = torch.randn(1, 3 * WIDTH, device=device, dtype=torch.bfloat16)
    gate, scale, shift = table.chunk(3, dim=-1)

    def replaced() -> tuple[Tensor, Tensor]:
        total = x + gate[:, None] * y
        norm = F.layer_norm(total, (WIDTH,), eps=1e-6)
        return total, norm * (1 + scale[:, None]) + shift[:, None]

    def replaced_quantized() -> tuple[Tensor, Tensor, Tensor]:
        total, h = replaced()
        return total, *reference.quantize_rows(h)

    yield Case(
        "gate_residual_adaln",
        f"gate_residual_adaln, {rows} rows",
        traffic.gate_residual_adaln(rows, WIDTH),
        replaced,
        lambda: gate_residual_adaln(x, y, gate, scale, shift),
    )
    yield Case(
        "gate_residual_adaln_quantize",
        f"gate_residual_adaln_quantize, {rows} rows",
        traffic.gate_residual_adaln(rows, WIDTH, quantized=True),
        replaced_quantized,
        lambda: gate_residual_adaln_quantize(x, y, gate, scale, shift, *room),
        room,
    )


if __name__ == "__main__":
    main("Time gate_residual_adaln and gate_residual_adaln_quantize.", cases)
