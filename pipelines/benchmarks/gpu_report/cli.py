"""The command line of the report: which stages, on what, for how long, and where the JSON goes."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from gpu_report import schema
from gpu_report.environment import environment
from gpu_report.report import Report
from gpu_report.runner import DeviceLost, Runner
from gpu_report.scale import FULL, SMALL
from gpu_report.stages import NAMES, stages_of
from gpu_report.subject import Subject
from gpu_report.table import table
from redux_pipelines.devices import resolve_dtype

DESCRIPTION = """\
Measure FLUX.1 + Redux at full size on a GPU, with random weights made there: no network, no
weights, nothing installed of this project. Writes gpu-report.json after each stage, so that a run
that is cut off keeps what it has, and prints a table at the end."""
BUDGET_S = 470.0
_RESUME = "--resume-started"


def main(arguments: Sequence[str], *, started: float) -> int:
    """Run the stages asked for; 0 if none failed. ``started`` is the Unix time of the start."""
    options = _parser().parse_args(arguments)
    device = _device(options.device)
    if device is None:
        print("torch sees no CUDA device: nothing was measured. For a run in little on a CPU: "
              "--device cpu --small", file=sys.stderr)  # fmt: skip
        return 2
    logging.basicConfig(level=logging.WARNING, format="  %(name)s: %(message)s")
    started = options.resume_started or started

    def go_on() -> None:
        _go_on(arguments, started)

    try:
        report = _begun(options, device)
        report.save()
    except OSError as error:
        print(f"--out {options.out} cannot be written to: {error}", file=sys.stderr)
        return 2
    runner = Runner(report, started=started, budget_s=options.budget, on_hang=go_on)
    runner.say(f"{report.path}, torch {torch.__version__}, {device}")
    subject = Subject(SMALL if options.small else FULL, device, resolve_dtype("auto", device))
    if not report.content["environment"]:
        report.content["environment"] = environment(device, subject.dtype)
        report.save()
    try:
        runner.run([each for each in stages_of(subject, report) if each.name in options.stages])
    except DeviceLost as reason:
        runner.say(f"the device is lost to this process, so another goes on: {reason}")
        go_on()
    return _end(report, runner)


def _begun(options: argparse.Namespace, device: torch.device) -> Report:
    """A new report, or what the process before this one left."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if options.resume_started:
        return Report.resumed(options.out)
    scale = "small" if options.small else "full"
    return Report.begun(options.out, device=device.type, scale=scale, budget_s=options.budget)


def _end(report: Report, runner: Runner) -> int:
    failures = report.content["failures"]
    for problem in schema.problems(report.content):
        print(f"the report is not as it should be: {problem}", file=sys.stderr)
    print("\n" + table(report.content), flush=True)
    runner.say(f"{report.path}: {len(failures)} of the stages failed or were left out")
    return 1 if failures else 0


def _go_on(arguments: Sequence[str], started: float) -> None:
    """Become a new process that runs what is left; the report says what that is."""
    own = [each for each in arguments if not each.startswith(_RESUME)]
    sys.stdout.flush()
    script = str(Path(__file__).resolve().parent)
    command = [sys.executable, script, *own, f"{_RESUME}={started}"]
    os.execv(sys.executable, command)


def _device(name: str) -> torch.device | None:
    """The device meant; None for a GPU where torch sees none."""
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        return None
    return torch.device(name if ":" in name else "cuda:0")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu-report",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (%(default)s)")
    parser.add_argument(
        "--small", action="store_true", help="a network of the same shape in little"
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, help="seconds for all of it (%(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench-results"),
        help="the folder for gpu-report.json (%(default)s)",
    )
    parser.add_argument(
        "--stages",
        type=_stages,
        default=NAMES,
        help=f"only these, separated by commas, of: {', '.join(NAMES)}",
    )
    parser.add_argument(_RESUME, type=float, default=0.0, help=argparse.SUPPRESS)
    return parser


def _stages(text: str) -> tuple[str, ...]:
    names = tuple(each.strip() for each in text.split(","))
    if unknown := [each for each in names if each not in NAMES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(NAMES)}")
    return names
