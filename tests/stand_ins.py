"""Computations that do not compute: what every start-up test has to refuse.

Each stands in the place of one that is right. Knows none of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Compute = Callable[..., Any]


class Computation(NamedTuple):
    """A right one, the names of its positional arguments, and of those that it writes to."""

    compute: Compute
    arguments: tuple[str, ...]
    written: tuple[str, ...] = ()

    def outputs(self, given: Sequence[Any]) -> list[Tensor]:
        """Those of ``given`` that are written to."""
        named = zip(self.arguments, given, strict=False)
        return [each for name, each in named if name in self.written and each is not None]


def doing_nothing(right: Computation) -> Compute:
    """Writes nowhere. What it allocates holds what is right, unless it is filled: the worst luck.

    What was just freed is what an allocator gives next.
    """

    def run(*given: Any, **more: Any) -> Any:
        before = [each.clone() for each in right.outputs(given)]
        result = right.compute(*given, **more)
        result = _each(result, torch.empty_like if _is_filled() else torch.clone)
        for each, old in zip(right.outputs(given), before, strict=True):
            each.copy_(old)
        return result

    return run


def _is_filled() -> bool:
    return bool(torch.empty(64).isnan().all())


def filling(value: float) -> Callable[[Computation], Compute]:
    """All that it should compute is ``value``."""

    def of(right: Computation) -> Compute:
        def run(*given: Any, **more: Any) -> Any:
            result = right.compute(*given, **more)
            for each in right.outputs(given):
                each.fill_(value)
            return _each(result, lambda out: torch.full_like(out, value))

        return run

    return of


def repeating(right: Computation) -> Compute:
    """Gives what it gave the first time that it was asked for these shapes."""
    kept: dict[Any, tuple[Any, list[Tensor]]] = {}

    def run(*given: Any, **more: Any) -> Any:
        outputs = right.outputs(given)
        if (key := _shapes(given)) not in kept:
            result = _each(right.compute(*given, **more), torch.clone)
            kept[key] = result, [each.clone() for each in outputs]
        result, before = kept[key]
        for each, old in zip(outputs, before, strict=True):
            each.copy_(old)
        return _each(result, torch.clone)

    return run


def fixing(argument: str, right: Computation) -> Compute:
    """Computes with the first ``argument`` that came with these shapes, whatever it is given."""
    at = right.arguments.index(argument)
    kept: dict[Any, Any] = {}

    def run(*given: Any, **more: Any) -> Any:
        key = _shapes(given[:at] + given[at + 1 :])
        first = kept.setdefault(key, _each(given[at], torch.clone))
        return right.compute(*given[:at], first, *given[at + 1 :], **more)

    return run


def _shapes(given: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(map(_shape, given))


def _shape(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.shape
    if isinstance(given, list):
        return len(given)
    return str(given) if isinstance(given, slice) else ""


def _each(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``result`` with ``change`` made to its tensors."""
    if isinstance(result, tuple | list):
        return type(result)(_each(each, change) for each in result)
    return change(result) if isinstance(result, Tensor) else result


NOT_COMPUTING = {
    "does nothing": doing_nothing,
    "zeros": filling(0.0),
    "nan": filling(float("nan")),
    "repeats itself": repeating,
}
