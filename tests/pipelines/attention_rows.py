"""Random rows for attention."""

import torch


def qkv(
    rows,
    queries=None,
    *,
    heads=2,
    width=16,
    batch=1,
    size=1.0,
    dtype=torch.float32,
    seed=0,
):
    """Rows as a single block's projection has them: heads beside each other.

    Queries are the last ``queries`` rows, or all, times ``size``.
    """
    generator = torch.Generator().manual_seed(seed)
    together = torch.randn(batch, rows, 3, heads, width, generator=generator, dtype=dtype)
    q, k, v = (each.transpose(1, 2) for each in together.unbind(2))
    return q[:, :, -(queries or rows) :] * size, k, v
