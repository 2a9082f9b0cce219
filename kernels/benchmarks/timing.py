"""What the benchmarks share: their command line, the clock, the table, the environment.

Each benchmark times one operator against what it replaces, in eager torch and under torch.compile,
with a cold L2 cache (the median over CUDA events). GB/s are the bytes that the operator must move
(``traffic.py``) over the time, for all three alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redux_kernels.self_test import self_test

ROWS = (2265, 4826, 5337, 10457)
"""Tokens of FLUX with Redux at 512², at 1024² with its text folded and not, and at 1536²."""


@dataclass(frozen=True)
class Case:
    """One operator at one size, and the torch code that it replaces; both give the same."""

    operator: str
    label: str
    size_bytes: int
    replaced: Callable[[], object]
    call: Callable[[], object]
    written: tuple[Tensor, ...] = ()
    """What ``call`` writes into, after what it returns; rows of a batch are one axis there."""


Cases = Callable[[int, torch.device], Iterator[Case]]


def main(description: str, cases: Cases) -> None:
    """Time every case at every number of rows, and print (and save) the table.

    Exits with a message where torch sees no GPU or refuses an operator on it.
    """
    arguments = _arguments(description)
    if not torch.cuda.is_available():
        sys.exit("This benchmark measures a GPU, and torch sees none: nothing was run.")
    device = torch.device("cuda", torch.cuda.current_device())
    verdicts = self_test(device)
    environment = _environment(device)
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    print(f"{'':44}{'eager':>18}{'compiled':>18}{'kernel':>18}")
    report: dict[str, Any] = {"environment": environment, "results": []}
    _save(report, arguments.json)
    for rows in arguments.rows:
        for case in cases(rows, device):
            if reason := verdicts[case.operator]:
                print(f"{case.label:44} not run: {reason}")
                continue
            report["results"].append(_measure(case))
            _save(report, arguments.json)


def _save(report: dict[str, Any], out: Path | None) -> None:
    """Write ``report``, all of it or nothing; after each case, for a run that is cut off."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f"{out.name}.part")
        part.write_text(json.dumps(report, indent=2) + "\n")
        part.replace(out)


def _arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="tokens (%(default)s)")
    parser.add_argument("--json", type=Path, help="a file to write each result to as well")
    return parser.parse_args()


def _environment(device: torch.device) -> dict[str, str]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def _measure(case: Case) -> dict[str, object]:
    from triton.testing import do_bench

    compiled = torch.compile(case.replaced, fullgraph=True)
    subjects: Sequence[tuple[str, Callable[[], object]]] = (
        ("eager", case.replaced),
        ("compiled", compiled),
        ("kernel", case.call),
    )
    times_us = {name: 1000 * do_bench(run, return_mode="median") for name, run in subjects}
    speeds = {name: case.size_bytes / time / 1000 for name, time in times_us.items()}
    cells = (f"{times_us[name]:7.1f} µs {speeds[name]:4.0f} GB/s" for name in times_us)
    print(f"{case.label:44}" + "".join(f"{cell:>18}" for cell in cells))
    return {"label": case.label, "size_bytes": case.size_bytes, "times_us": times_us}
