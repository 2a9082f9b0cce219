"""The loop that every trainer shares: step, report, save, look, until the budget is spent.

Knows nothing of what is trained.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from training.progress import Journal, TrainingClock, load_checkpoint, save_checkpoint
from training.settings import Cadence


class Stateful(Protocol):
    """A part of a run that its checkpoint holds."""

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take over a state."""
        ...


class Run(ABC):
    """A run in ``folder``: its clock, step, journal and checkpoint, the latter two by ``name``."""

    def __init__(self, folder: Path, name: str, clock: TrainingClock, cadence: Cadence) -> None:
        self.clock, self.step = clock, 0
        self.checkpoint = folder / f"{name}.pt"
        self.journal = Journal(folder / f"{name}.jsonl")
        self._cadence = cadence
        self._parts: dict[str, Stateful] = {}
        self._sums: dict[str, list[float]] = {}

    def keep(self, **parts: Stateful) -> None:
        """Name what a checkpoint holds, and go on where an earlier run was saved."""
        self._parts = parts
        state = load_checkpoint(self.checkpoint)
        if state is not None:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self.clock.spent_s = state["step"], state["spent_s"]

    def save(self) -> None:
        """Write the checkpoint."""
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"step": self.step, "spent_s": self.clock.spent_s}
        save_checkpoint(self.checkpoint, state)

    @abstractmethod
    def train_step(self) -> dict[str, float]:
        """One update, which counts ``step`` up; returns the parts of the loss."""

    def look(self) -> dict[str, float]:
        """Measure what there is so far; called now and then, and at the end."""
        return {}

    def run(self) -> None:
        """Train until the budget is spent."""
        saved_at = looked_at = self.clock.spent_s
        self.clock.start()
        while not self.clock.is_over:
            self._add(self.train_step())
            self.clock.tick()
            if self.clock.spent_s - saved_at >= self._cadence.save_every_s:
                saved_at = self.clock.spent_s
                self.save()
                self.clock.start()
            if 0 < self._cadence.look_every_s <= self.clock.spent_s - looked_at:
                looked_at = self.clock.spent_s
                self._write("look", self.look())
                self.clock.start()
        self.save()
        if self._cadence.look_every_s:
            self._write("look", self.look())

    def _add(self, parts: dict[str, float]) -> None:
        for name, value in parts.items():
            self._sums.setdefault(name, []).append(value)
        if self.step % self._cadence.report_every == 0:
            self._write("step", {name: float(np.mean(each)) for name, each in self._sums.items()})
            self._sums.clear()

    def _write(self, event: str, values: dict[str, float]) -> None:
        self.journal.write(event, step=self.step, minutes=self.clock.spent_s / 60, **values)
