"""LayerNorm and modulation, with and without quantisation: ``python bench_adaln.py --help``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import traffic
from timing import Case, main
from torch import Tensor

from redux_kernels import checks, reference
from redux_kernels.adaln import adaln, adaln_quantize

WIDTH = 3072


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    x = torch.randn(1, rows, WIDTH, device=device, dtype=torch.bfloat16)
    room = checks.empty_quantized(x, WIDTH)
    scale, shift = torch.randn(1, 2 * WIDTH, device=device, dtype=torch.bfloat16).chunk(2, dim=-1)

    def replaced() -> Tensor:
        return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    yield Case(
        "adaln",
        f"adaln, {rows} rows",
        traffic.adaln(rows, WIDTH),
        replaced,
        lambda: adaln(x, scale, shift),
    )
    yield Case(
        "adaln_quantize",
        f"adaln_quantize, {rows} rows",
        traffic.adaln(rows, WIDTH, quantized=True),
        lambda: reference.quantize_rows(replaced()),
        lambda: adaln_quantize(x, scale, shift, *room),
        room,
    )


if __name__ == "__main__":
    main("Time adaln and adaln_quantize.", cases)
