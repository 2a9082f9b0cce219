"""Attentions over groups of keys joined into one: ``python bench_merge_groups.py --help``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import traffic
from timing import Case, main
from torch import Tensor

from redux_kernels.merge_groups import merge_groups

HEADS, D = 24, 128
COPIES, STRENGTH = 512, 0.5
COUNTS = {"folded text": (1, 1), "and a picture": (2, 1), "and four": (5, 1)}
"""Groups with an attention of their own, and single keys."""


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    for label, (parts, keys) in COUNTS.items():
        yield _case(f"merge_groups, {label}, {rows} rows", rows, parts, keys, device)


def _case(label: str, rows: int, parts: int, keys: int, device: torch.device) -> Case:
    q = torch.randn(1, HEADS, rows, D, device=device, dtype=torch.bfloat16)
    by_rows = torch.randn(parts, 1, rows, HEADS, D, device=device, dtype=torch.bfloat16)
    outs = list(by_rows.transpose(2, 3))
    lses = list(6 + torch.randn(parts, 1, HEADS, rows, device=device))
    biases = [0.0] + [math.log(STRENGTH)] * (parts - 1)
    singles = list(torch.randn(keys, 1, HEADS, D, device=device, dtype=torch.bfloat16))
    values = list(torch.randn(keys, 1, HEADS, D, device=device, dtype=torch.bfloat16))
    key_biases = [math.log(COPIES)] * keys

    def replaced() -> Tensor:
        """One after the other, as torch would."""
        out, lse = outs[0], lses[0]
        for other, other_lse, bias in zip(outs[1:], lses[1:], biases[1:], strict=True):
            w = torch.sigmoid(other_lse + bias - lse)[..., None]
            out = (out + w * (other - out)).to(out.dtype)
            lse = torch.logaddexp(lse, other_lse + bias)
        for key, value, bias in zip(singles, values, key_biases, strict=True):
            logit = (q.float() * key.float()[:, :, None]).sum(-1) / math.sqrt(D) + bias
            w = torch.sigmoid(logit - lse)[..., None]
            out = (out + w * (value[:, :, None] - out)).to(out.dtype)
            lse = torch.logaddexp(lse, logit)
        return out

    def call() -> Tensor:
        into = torch.empty_like(outs[0])
        merge_groups(outs, lses, biases, q, singles, values, key_biases, into)
        return into

    size_bytes = traffic.merge_groups(rows, HEADS, D, parts=parts, keys=keys)
    return Case("merge_groups", label, size_bytes, replaced, call)


if __name__ == "__main__":
    main("Time merge_groups.", cases)
