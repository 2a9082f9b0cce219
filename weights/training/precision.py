"""The dtype that trains fastest on this CPU. Knows no models."""

import torch

from redux_pipelines.devices import has_fast_bfloat16

_CPU = torch.device("cpu")


def compute_dtype() -> torch.dtype:
    """bfloat16 where that is fast, else float32."""
    return torch.bfloat16 if has_fast_bfloat16(_CPU) else torch.float32


def autocast() -> torch.autocast:
    """A context that computes matrix products in ``compute_dtype``."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16(_CPU))
