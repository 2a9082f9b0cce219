"""The options that the training commands share."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from redux_pipelines.memory.malloc import keep_freed_memory
from training.progress import TrainingClock
from training.settings import FULL, SMOKE, Sizes
from training.workplace import DEFAULT_ROOT, Workplace


@dataclass(frozen=True)
class Options:
    """What a command was told."""

    place: Workplace
    sizes: Sizes
    clock: TrainingClock


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that knows where to work, how large and on how many threads."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--work", type=Path, default=DEFAULT_ROOT, help="default: %(default)s")
    made.add_argument("--smoke", action="store_true", help="the toy sizes of the tests")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    return made


def parse(made: argparse.ArgumentParser, *, minutes: float) -> tuple[Options, argparse.Namespace]:
    """Read the command line with the options of ``made`` too; ``minutes`` is the default budget.

    ``--steps`` budgets steps instead of time, which makes runs repeatable.
    """
    made.add_argument("--minutes", type=float, default=minutes, help="default: %(default)s")
    made.add_argument("--steps", type=int, help="train this many steps, however long it takes")
    given = made.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    options = Options(
        place=Workplace(given.work),
        sizes=SMOKE if given.smoke else FULL,
        clock=make_clock(given.minutes, given.steps),
    )
    return options, given


def make_clock(minutes: float, steps: int | None = None) -> TrainingClock:
    """A budget in minutes or, if given, in steps."""
    return TrainingClock(60 * minutes) if steps is None else TrainingClock(float(steps), 1.0)
