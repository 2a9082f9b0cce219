"""Which implementation computes attention: the first that may run there and proves itself right.

Decided once, when a model is loaded, by a test on the device that will run it. It fails closed:
what raises, or differs from a float32 reference, is not used, and the reason is kept. Knows no
network and no settings but their words; the test's rows are laid out as the network's are.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from redux_pipelines.attention.backends import IMPLEMENTATIONS
from redux_pipelines.attention.flash_libraries import first_line
from redux_pipelines.attention.groups import Attention, Groups, Implementation, KeyGroup, reference
from redux_pipelines.errors import AttentionError

AUTO = "auto"
NAMES = tuple(each.name for each in IMPLEMENTATIONS)
"""What may be asked for by name."""
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation taken, and why each one before it was not."""

    attention: Implementation
    refusals: Mapping[str, str]


def candidates_for(wanted: str) -> tuple[Implementation, ...]:
    """Those that ``wanted`` allows, in its order: ``auto``, or names separated by commas.

    ``auto`` has all of them. Raises ``ValueError`` for a name that none has.
    """
    if wanted == AUTO:
        return IMPLEMENTATIONS
    by_name = {each.name: each for each in IMPLEMENTATIONS}
    names = [name.strip() for name in wanted.split(",")]
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(
            f"attention={wanted!r}: {unknown[0]!r} is not one of {AUTO}, {', '.join(NAMES)}"
        )
    return tuple(by_name[name] for name in names)


def refusal(
    candidate: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    asked_for: bool = False,
) -> str | None:
    """Why ``candidate`` cannot be used, or None: it exists there and agrees with the reference.

    Whatever goes wrong is a reason. ``asked_for``: somebody named it.
    """
    try:
        reason = candidate.unfit(device, dtype)
        if reason is None and not asked_for:
            reason = candidate.on_request or None
        if reason is None and candidate.make_ready is not None:
            reason = candidate.make_ready(device, dtype, head_dim)
        if reason is not None:
            return reason
        # rows of its own: what it does not write may hold what another one has written
        seed = zlib.crc32(candidate.name.encode())
        error = self_test(candidate, device, dtype, head_dim, seed=seed)
    except Exception as failure:
        return f"failed: {first_line(failure) or type(failure).__name__}"
    if not error <= _TOLERANCE[dtype]:  # NaN is not
        return f"is wrong: relative error {error:.1e}, at most {_TOLERANCE[dtype]:.0e} allowed"
    return None


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    candidates: tuple[Implementation, ...] = IMPLEMENTATIONS,
    *,
    asked_for: bool = False,
) -> Choice:
    """Take the first of ``candidates`` that runs and passes its test.

    ``asked_for``: somebody named them, so that those that wait to be named are tried, too. Raises
    ``AttentionError`` if none can be used, with the reasons and what could be.
    """
    refusals: dict[str, str] = {}
    for candidate in candidates:
        reason = refusal(candidate, device, dtype, head_dim, asked_for=asked_for)
        if reason is None:
            return Choice(candidate, refusals)
        refusals[candidate.name] = reason
    reasons = "; ".join(f"{name} {reason}" for name, reason in refusals.items())
    usable = usable_names(device, dtype, head_dim) if asked_for else ()
    hint = f"; what can be used here: {', '.join((AUTO, *usable))}" if usable else ""
    kind = str(dtype).removeprefix("torch.")
    raise AttentionError(f"no attention for {kind} on {device}: {reasons}{hint}")


def resolve(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """``choose`` among what the setting ``wanted`` allows (see ``candidates_for``)."""
    candidates = candidates_for(wanted)
    return choose(device, dtype, head_dim, candidates, asked_for=wanted != AUTO)


def survey(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str | None]:
    """For every implementation why it cannot be used there, or None. Downloads nothing."""
    return {each.name: refusal(each, device, dtype, head_dim) for each in IMPLEMENTATIONS}


def usable_names(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """Those that ``auto`` could take there."""
    found = survey(device, dtype, head_dim)
    return tuple(name for name, reason in found.items() if reason is None)


# --- The test -------------------------------------------------------------------------------------

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
def self_test(
    attend: Attention, device: torch.device, dtype: torch.dtype, head_dim: int, *, seed: int = 0
) -> float:
    """The worst query's error, relative to the size of the case's outputs; NaN if there is one.

    Small, and made so that usual mistakes show: a bias that is ignored, keys left out at the end of
    a tile, a log-sum-exp of the wrong base, a wrong scale, weights that overflow, a result that is
    not where it was wanted. Each case comes a second time with other rows and biases, so that what
    does nothing, or gives again what it gave before, is wrong. Drawn from a generator of its own.
    ``reference`` gets the same rounded rows. Raises ``ValueError`` for an output of another shape
    or dtype, and whatever ``attend`` raises.
    """
    generator = torch.Generator().manual_seed(seed)
    errors = [
        _error(attend, case._replace(groups=_stronger(case.groups, times)))
        for times in (1.0, 1.25)
        for case in _cases(device, dtype, head_dim, generator)
    ]
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


def _stronger(groups: Groups, times: float) -> Groups:
    return tuple(KeyGroup(each.rows, times * each.bias) for each in groups)


def _cases(
    device: torch.device, dtype: torch.dtype, head_dim: int, generator: torch.Generator
) -> Iterator[_Case]:
    """Plain rows; rows that each look at one key, two of them at unseen ones; single groups.

    And a folded key, whose copies may have a kernel of their own.
    """

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
