"""The small pieces of FLUX's transformer that hold no more than one weight.

Follows black-forest-labs/flux ``modules/layers.py`` and ``math.py``; every function says what it
fuses. Knows no blocks.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redux_pipelines.sampling import Grid, image_ids

EPS = 1e-6
_THETA = 10_000.0
_TIME_CHANNELS = 256


class MLPEmbedder(nn.Module):
    """Linear, SiLU, linear: how a time, a guidance or a pooled text becomes ``(N, H)``."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_dim)`` to ``(N, H)``."""
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


def timestep_embedding(times: Tensor) -> Tensor:
    """Sinusoids ``(N, 256)`` of ``times (N,)``, cosines first; float32 whatever the model's dtype.

    Times are 0…1000. The arithmetic is diffusers', operation by operation: its float32 rounding is
    part of what the model was distilled with.
    """
    half = _TIME_CHANNELS // 2
    steps = torch.arange(half, dtype=torch.float32, device=times.device)
    angles = times.float()[:, None] * torch.exp(-math.log(_THETA) * steps / half)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``layer_norm(x) · scale + shift``; ``scale`` and ``shift`` are ``(H,)``, or ``(B, 1, H)``.

    ``scale`` has its 1 added already. A modulation that serves the whole batch is the norm's own
    affine map, which makes it one pass; one per image takes another.
    """
    if scale.dim() == 1:
        return F.layer_norm(x, (x.shape[-1],), scale, shift, EPS)
    return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), eps=EPS), scale)


def gelu_(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, in place."""
    out: Tensor = torch.ops.aten.gelu_(x, approximate="tanh")
    return out


def within_range_(x: Tensor) -> Tensor:
    """``x`` in place: FLUX's activations exceed float16's range here and there. NaN stays."""
    if x.dtype == torch.float16:
        limit = torch.finfo(x.dtype).max
        x.clamp_(-limit, limit)
    return x


class Rope(NamedTuple):
    """Rotations of neighbouring pairs, ``(S, 1, 1, D)`` each: ``x · cos + swap_pairs(x) · sin``.

    So ``sin`` is negative at even places.
    """

    cos: Tensor
    sin: Tensor

    def rows(self, first: int, end: int) -> "Rope":
        """The rotations of rows ``first`` up to ``end``."""
        return Rope(self.cos[first:end], self.sin[first:end])


def rope_table(txt_rows: int, grid: Grid, axes_dim: tuple[int, ...]) -> Rope:
    """Rotations of ``txt_rows`` rows at position 0 and of the image's, float32 on the CPU.

    Angles are taken in double precision, once per grid, as diffusers does at every step: at the far
    edge of an image float32 angles give cosines that are off by 4e-6.
    """
    ids = torch.cat([torch.zeros(txt_rows, 3), image_ids(grid)]).double()
    angles = [
        torch.outer(ids[:, axis], _THETA ** -(torch.arange(0, dim, 2).double() / dim))
        for axis, dim in enumerate(axes_dim)
    ]
    angle = torch.cat(angles, dim=1)
    cos, sin = angle.cos().float(), angle.sin().float()
    pairs = (torch.stack([cos, cos], dim=-1), torch.stack([-sin, sin], dim=-1))
    return Rope(*(each.flatten(1)[:, None, None] for each in pairs))


def swap_pairs(x: Tensor) -> Tensor:
    """A copy in which neighbours 0 and 1, 2 and 3, … of the last dimension have changed places."""
    return x.view(*x.shape[:-1], x.shape[-1] // 2, 2).flip(-1).flatten(-2)


def norm_rope(qk: Tensor, weight: Tensor, rope: Rope, out: Tensor) -> None:
    """RMSNorm, then RoPE, of ``qk (B, S, n, heads, D)`` into ``out`` of that shape.

    ``weight (n, 1, D)``. Computed in the dtype of ``rope``.
    """
    if torch.compiler.is_compiling() or out.dtype != rope.cos.dtype:
        norm_rope_in_reals(qk, weight, rope, out)
        return
    torch.mul(qk, weight, out=out)
    out.mul_(_inverse_rms(qk))
    turns = torch.complex(rope.cos[..., ::2], rope.sin[..., 1::2])
    torch.view_as_complex(out.view(*out.shape[:-1], out.shape[-1] // 2, 2)).mul_(turns)


def norm_rope_in_reals(qk: Tensor, weight: Tensor, rope: Rope, out: Tensor) -> None:
    """``norm_rope`` where pairs cannot be complex numbers in ``out``, as in compiled code.

    The norm's weight goes into the rotation and its division comes last: four passes if not fused.
    """
    x = qk.to(rope.cos.dtype)
    rotated = swap_pairs(x).mul_(rope.sin * swap_pairs(weight))
    rotated.addcmul_(x, rope.cos * weight)
    out.copy_(rotated.mul_(_inverse_rms(x)))


def _inverse_rms(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().mul_(1 / x.shape[-1]).add_(EPS).rsqrt_()
