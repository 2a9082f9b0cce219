"""Quantisation of rows alone: ``python bench_quantize_rows.py --help``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import traffic
from timing import Case, main

from redux_kernels import checks, reference
from redux_kernels.quantize_rows import quantize_rows

WIDTH = 3072


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    """Attention's output before a double block's projection."""
    x = torch.randn(1, rows, WIDTH, device=device, dtype=torch.bfloat16)
    room = checks.empty_quantized(x, WIDTH)
    yield Case(
        "quantize_rows",
        f"quantize_rows, {rows} rows",
        traffic.quantize_rows(rows, WIDTH),
        lambda: reference.quantize_rows(x),
        lambda: quantize_rows(x, *room),
        room,
    )


if __name__ == "__main__":
    main("Time quantize_rows.", cases)
