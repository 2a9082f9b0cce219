"""Every operator's benchmark in one run: ``python bench_all.py --json results.json``."""

from __future__ import annotations

from collections.abc import Iterator

import bench_adaln
import bench_biased_attention
import bench_gate_residual_adaln
import bench_gelu_into
import bench_gelu_quantize
import bench_group_norm_silu
import bench_merge_groups
import bench_qk_norm_rope
import bench_quantize_rows
import torch
from timing import Case, main

BENCHMARKS = (
    bench_adaln,
    bench_gate_residual_adaln,
    bench_qk_norm_rope,
    bench_gelu_into,
    bench_gelu_quantize,
    bench_quantize_rows,
    bench_group_norm_silu,
    bench_merge_groups,
    bench_biased_attention,
)


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    for benchmark in BENCHMARKS:
        yield from benchmark.cases(rows, device)


if __name__ == "__main__":
    main("Time every operator.", cases)
