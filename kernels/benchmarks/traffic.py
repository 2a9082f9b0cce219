"""The bytes that each operator must move through a GPU's memory, from its sizes alone.

A lower bound: every row is read and written once, vectors and weights are left out (they stay in
cache). Bytes over a memory's bandwidth is a bound on time and never a measurement.
"""

from __future__ import annotations

SCALE_BYTES = 4  # one float32 a quantised row
E4M3_BYTES = 1


def adaln(rows: int, width: int, *, element: int = 2, quantized: bool = False) -> int:
    """``adaln``: x in; h out, or q and its scales. ``rows`` counts those of all images."""
    return rows * (width * element + _normed(width, element, quantized))


def gate_residual_adaln(
    rows: int, width: int, *, element: int = 2, quantized: bool = False
) -> int:  # fmt: skip
    """``gate_residual_adaln``: x and y in; their sum and h out, or q and its scales."""
    return rows * (3 * width * element + _normed(width, element, quantized))


def qk_norm_rope(
    rows: int, heads: int, d: int, *, element: int = 2, copies_v: bool = True
) -> int:  # fmt: skip
    """``qk_norm_rope``: q, k and (unless it stays where it is) v in and out, and the angles."""
    parts = 3 if copies_v else 2
    return rows * (2 * parts * heads * d * element + 2 * (d // 2) * 4)


def gelu_into(rows: int, width: int, *, element: int = 2) -> int:
    """``gelu_into``: mlp in and out."""
    return rows * 2 * width * element


def gelu_quantize(rows: int, width: int, beside: int = 0, *, element: int = 2) -> int:
    """``gelu_quantize``: mlp and what stands beside it in; q and its scales out."""
    columns = width + beside
    return rows * (columns * (element + E4M3_BYTES) + SCALE_BYTES)


def quantize_rows(rows: int, width: int, *, element: int = 2) -> int:
    """``quantize_rows``: x in; q and its scales out."""
    return rows * (width * (element + E4M3_BYTES) + SCALE_BYTES)


def merge_groups(
    rows: int, heads: int, d: int, *, parts: int = 1, keys: int = 1, element: int = 2
) -> int:  # fmt: skip
    """``merge_groups``: outputs and log-sum-exps of parts in, and q for keys; one output out."""
    return rows * heads * ((parts + bool(keys) + 1) * d * element + 4 * parts)


def biased_attention(queries: int, keys: int, heads: int, d: int, *, element: int = 2) -> int:
    """``biased_attention``: q, k and v in, one output out. Its time is arithmetic, not traffic."""
    return 2 * (queries + keys) * heads * d * element + 4 * keys


def group_norm_statistics(rows: int, channels: int, *, element: int = 2) -> int:
    """``group_norm_statistics``: x in."""
    return rows * channels * element


def group_norm_silu(rows: int, channels: int, *, element: int = 2) -> int:
    """``group_norm_silu``: x in and out."""
    return rows * 2 * channels * element


def _normed(width: int, element: int, quantized: bool) -> int:
    return width * E4M3_BYTES + SCALE_BYTES if quantized else width * element
