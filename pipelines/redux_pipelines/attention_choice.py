"""Which implementation computes attention: the first that may run there and proves itself right.

Decided once, when a model is loaded. It fails closed: what raises, or differs from a float32
reference, is not used, and the reason is kept. Knows no network and no settings but their words.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from redux_pipelines.attention import Implementation
from redux_pipelines.attention_backends import IMPLEMENTATIONS
from redux_pipelines.attention_self_test import self_test
from redux_pipelines.errors import AttentionError
from redux_pipelines.flash_libraries import first_line

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
        error = self_test(candidate, device, dtype, head_dim)
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
    told = "; ".join(f"{name} {reason}" for name, reason in refusals.items())
    usable = usable_names(device, dtype, head_dim) if asked_for else ()
    hint = f"; what can be used here: {', '.join((AUTO, *usable))}" if usable else ""
    kind = str(dtype).removeprefix("torch.")
    raise AttentionError(f"no attention for {kind} on {device}: {told}{hint}")


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
