"""The dtype that trains fastest on this CPU. Knows no models."""

import torch


def has_fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 have kernels of their own here (AVX-512, AMX, Arm's).

    Elsewhere torch multiplies them one by one: a hundred times slower than float32.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_dtype() -> torch.dtype:
    """bfloat16 where that is fast, else float32."""
    return torch.bfloat16 if has_fast_bfloat16() else torch.float32


def autocast() -> torch.autocast:
    """A context that computes matrix products in ``compute_dtype``."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16())
