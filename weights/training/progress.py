"""Time budgets, logs and checkpoints of runs that may be paused, stopped and resumed.

Knows nothing of what is trained.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

_LONGEST_STEP_S = 20.0


class TrainingClock:
    """Seconds spent in training steps. A pause (SIGSTOP, suspend) counts as one step at most.

    With ``step_s`` every step counts that much, however long it took: runs become repeatable.
    """

    def __init__(self, budget_s: float, step_s: float | None = None) -> None:
        self.budget_s = budget_s
        self.spent_s = 0.0
        self._step_s = step_s
        self._last = time.monotonic()

    def start(self) -> None:
        """Begin a step: what happened since the last ``tick`` is not counted."""
        self._last = time.monotonic()

    def tick(self) -> None:
        """Count the time since ``start`` or the last ``tick``."""
        now = time.monotonic()
        measured = min(now - self._last, _LONGEST_STEP_S)
        self.spent_s += measured if self._step_s is None else self._step_s
        self._last = now

    @property
    def fraction(self) -> float:
        """How much of the budget is spent, 0…1."""
        return min(1.0, self.spent_s / self.budget_s) if self.budget_s > 0 else 1.0

    @property
    def is_over(self) -> bool:
        """Whether nothing of the budget is left."""
        return self.fraction >= 1.0


def decay(fraction: float, constant: float, floor: float = 0.02) -> float:
    """Learning rate factor: 1 for ``constant`` of the budget, then linear down to ``floor``."""
    return max(floor, min(1.0, (1 - fraction) / (1 - constant)))


class Journal:
    """A JSON-lines file of measurements, echoed to the terminal."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def write(self, event: str, **values: float | int | str) -> None:
        """Append one line; numbers are rounded to five digits."""
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"event": event, **rounded})
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


class Average:
    """Exponential moving average of a module's weights, warming up to ``decay``."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._updates = 0
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the module's weights."""
        self._updates += 1
        keep = min(self._decay, (1 + self._updates) / (10 + self._updates))
        floats = [
            (own, new)
            for (own, new) in zip(self.weights.values(), module.state_dict().values(), strict=True)
            if own.is_floating_point()
        ]
        torch._foreach_lerp_([own for own, _ in floats], [new for _, new in floats], 1 - keep)

    def state_dict(self) -> dict[str, Any]:
        """Weights and the number of updates."""
        return {"weights": self.weights, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self._updates = state["updates"]
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write all or nothing: a run killed while saving leaves the checkpoint before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    torch.save(state, draft)
    os.replace(draft, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """What ``save_checkpoint`` wrote, or None where there is nothing."""
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state
