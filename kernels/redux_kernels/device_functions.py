"""What several kernels do with a tile of rows: LayerNorm, quantisation.

Functions for the inside of kernels; they know no pointers but those given.
"""

from __future__ import annotations

from redux_kernels.compiler import constexpr, jit, tensor, tl


@jit
def normalize_rows(x: tensor, mask: tensor, width: constexpr, eps: tensor) -> tensor:
    """(x - mean) / sqrt(var + eps) along axis 1 of a float32 tile; ``x`` is 0 outside ``mask``.

    The variance is taken about the mean, in a second pass over registers: E[x²] - E[x]² cancels
    for FLUX's outlier channels.
    """
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(mask, x - mean[:, None], 0.0)
    var = tl.sum(centred * centred, axis=1) / width
    return centred * tl.rsqrt(var + eps)[:, None]


@jit
def scale_of_rows(amax: tensor) -> tensor:
    """The scale that maps a row's largest magnitude to e4m3's largest number, 448."""
    return tl.maximum(amax, 1e-12) * (1.0 / 448.0)


@jit
def gelu_tanh(x: tensor) -> tensor:
    """GELU in its tanh form, written with a sigmoid: (1 + tanh(u)) / 2 = sigmoid(2u)."""
    twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-twice))
