"""GELU and quantisation of rows: ``python bench_gelu_quantize.py --help``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import traffic
from timing import Case, main

from redux_kernels import checks, reference
from redux_kernels.gelu_quantize import gelu_quantize

WIDTH = 3072


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    """A double block's rows, and a single block's with attention beside them."""
    mlp = torch.randn(1, rows, 4 * WIDTH, device=device, dtype=torch.bfloat16)
    beside = torch.randn(1, rows, WIDTH, device=device, dtype=torch.bfloat16)
    alone, both = (checks.empty_quantized(mlp, width * WIDTH) for width in (4, 5))
    yield Case(
        "gelu_quantize",
        f"gelu_quantize alone, {rows} rows",
        traffic.gelu_quantize(rows, 4 * WIDTH),
        lambda: reference.quantize_rows(F.gelu(mlp, approximate="tanh")),
        lambda: gelu_quantize(mlp, None, *alone),
        alone,
    )
    yield Case(
        "gelu_quantize",
        f"gelu_quantize beside attention, {rows} rows",
        traffic.gelu_quantize(rows, 4 * WIDTH, WIDTH),
        lambda: reference.quantize_rows(torch.cat((beside, F.gelu(mlp, approximate="tanh")), -1)),
        lambda: gelu_quantize(mlp, beside, *both),
        both,
    )


if __name__ == "__main__":
    main("Time gelu_quantize.", cases)
