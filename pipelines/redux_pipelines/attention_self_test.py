"""Attention against a float32 reference, on the device that will run it.

Small, and made so that usual mistakes show: a bias that is ignored, keys left out at the end of a
tile, a log-sum-exp of the wrong base, a wrong scale, weights that overflow, a result that is not
where it was wanted. Knows no network; the rows are laid out as the network's are.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from redux_pipelines.attention import Attention, Groups, KeyGroup, reference

_HEADS = 2
_SEVERAL_TILES = (
    KeyGroup(5, -math.inf),
    KeyGroup(1, math.log(512)),
    KeyGroup(1, -2.0),
    KeyGroup(131, math.log(0.3)),
    KeyGroup(563, 0.0),
)
_FOLDED = (KeyGroup(7, -math.inf), KeyGroup(1, math.log(512)), KeyGroup(152, 0.0))
_PEAK = 3.0
"""Queries of this many times a key look at that key alone: √D · 3 above the others' logits."""


class _Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    groups: Groups


@torch.inference_mode()
def self_test(attend: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """The worst query's error, relative to the size of the case's outputs; NaN if there is one.

    Drawn from a generator of its own. ``reference`` gets the same rounded rows. Raises
    ``ValueError`` for an output of another shape or dtype, and whatever ``attend`` raises.
    """
    errors = [_error(attend, case) for case in _cases(device, dtype, head_dim)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _error(attend: Attention, case: _Case) -> float:
    """Of the result by itself, and of that written among the columns of wider rows."""
    got, kind = attend(*case), torch.promote_types(case.q.dtype, torch.float32)
    if got.shape != case.q.shape or got.dtype != case.q.dtype:
        raise ValueError(
            f"gives {tuple(got.shape)} {got.dtype} for queries {tuple(case.q.shape)} {case.q.dtype}"
        )
    batch, heads, rows, width = got.shape
    into = got.new_full((batch, rows, 3, heads, width), math.nan)[:, :, 1].transpose(1, 2)
    attend(*case, into)
    expected = reference(case.q.to(kind), case.k.to(kind), case.v.to(kind), case.groups)
    errors = (torch.stack([got, into]).to(kind) - expected).norm(dim=-1)
    return float(errors.max() / expected.norm(dim=-1).mean())


def _cases(device: torch.device, dtype: torch.dtype, head_dim: int) -> Iterator[_Case]:
    """Plain rows; rows that each look at one key, two of them at unseen ones; single groups.

    And a folded key, whose copies may have a kernel of their own.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, _HEADS, head_dim, generator=generator)

    def case(qk: Tensor, groups: Groups, first_query: int, batch: int) -> _Case:
        wide = draw(batch, qk.shape[1], 7)  # a single block's projection
        qk, wide = qk.to(device, dtype), wide.to(device, dtype)
        q, k = (each.transpose(1, 2) for each in qk.unbind(2))
        return _Case(q[:, :, first_query:], k, wide[:, :, 2].transpose(1, 2), groups)

    rows = sum(group.rows for group in _SEVERAL_TILES)
    yield case(draw(2, rows, 2), _SEVERAL_TILES, rows - 150, 2)
    keys = draw(1, rows, 1)
    yield case(torch.cat([_PEAK * keys, keys], dim=2), _SEVERAL_TILES, 3, 1)
    yield case(draw(2, 64, 2), (KeyGroup(64, 0.0),), 0, 2)
    yield case(draw(1, 9, 2), (KeyGroup(8, 1.0), KeyGroup(1, -0.5)), 8, 1)
    yield case(draw(2, 160, 2), _FOLDED, 7, 2)
