"""``flux-redux bench`` and ``bench compare``: what is given as a plan, asked about, carried out.

Knows no HTTP and no statistics.
"""

import asyncio
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redux_server.bench import plan as plans
from redux_server.bench.target import read_keys, read_targets
from redux_server.bench.task_client import Limits
from redux_server.bench.workload import Workload, read_parameters, read_pictures
from redux_server.cli.progress import ProgressReport, note
from redux_server.settings import UsageError

if TYPE_CHECKING:
    from redux_server.bench.quality import Encoder

_NEEDED = ("aiohttp", "matplotlib")


def bench(
    *,
    targets: Sequence[str],
    pictures: str,
    parameters: Sequence[str],
    max_cost: float | None,
    out: str,
    is_agreed: bool,
    is_dry_run: bool,
    encoder: str,
    **load: Any,
) -> int:
    """Say what will be asked for and what it costs; measure; write the report."""
    _check_installed()
    plan = _plan(read_targets(targets), pictures, parameters, load)
    keys = read_keys(plan.targets, os.environ)
    for line in plan.lines():
        print(line)
    plans.check(plan, max_cost)
    if is_dry_run:
        return 0
    if plan.needs_consent and not is_agreed and not _agrees():
        note("nothing was sent")
        return 1
    folder = Path(out or datetime.now().strftime("bench-%Y%m%d-%H%M%S"))
    return _run(plan, keys, folder, encoder)


def compare(*, old: str, new: str) -> int:
    """Print what became slower or faster; 1 if a median or a p95 became slower."""
    from redux_server.bench import compare as comparing

    before, after = comparing.read_report(old), comparing.read_report(new)
    changes = comparing.compare(before, after)
    for line in comparing.lines(before, after, changes):
        print(line)
    return int(comparing.is_regression(changes))


def _plan(
    targets: Sequence[Any], pictures: str, parameters: Sequence[str], load: dict[str, Any]
) -> plans.Plan:
    timeout_s, poll_s, seed = load.pop("timeout_s"), load.pop("poll_s"), load.pop("seed")
    has_knee, images = load["has_knee"], load.pop("images")
    if has_knee and load["clients"] is not None:
        raise UsageError("--find-knee sends at a rate of its own; leave out --clients")
    if load["rate"] is not None and load["clients"] is not None:
        raise UsageError("--rate sends whatever happens; it does not go with --clients")
    if images is None:
        images = plans.DEFAULT_KNEE_IMAGES if has_knee else _images(load)
    arrivals = load.pop("arrivals") or ("even" if has_knee else "poisson")
    clients = load.pop("clients")
    return plans.Plan(
        targets=targets,
        workload=Workload(read_pictures(pictures), read_parameters(parameters), seed),
        images=images,
        clients=1 if clients is None else clients,
        arrivals=arrivals,
        limits=Limits(timeout_s, poll_s),
        seed=seed,
        **load,
    )


def _images(load: Mapping[str, Any]) -> int:
    """As many as the rate gives in the duration, else a few."""
    if load["rate"] and load["duration_s"]:
        count: int = round(load["rate"] * load["duration_s"] / 60)
        return max(1, count)
    return plans.DEFAULT_IMAGES


def _check_installed() -> None:
    """Before anything is paid for. Raises ``UsageError``."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UsageError(
            f"bench needs {' and '.join(missing)}; install it with: "
            "pip install -c constraints.txt '.[bench]' (in the project's folder)"
        )


def _agrees() -> bool:
    """Whether the user says yes. Raises ``UsageError`` where nobody can be asked."""
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked here whether to go on; give --yes")
    try:
        return input("Go on? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _run(plan: plans.Plan, keys: Mapping[str, str], path: Path, encoder: str) -> int:
    from redux_server.bench import run  # aiohttp is known to be there only now
    from redux_server.bench.report import HTML, Folder

    with closing(Folder(path)) as folder:
        with closing(ProgressReport()) as progress:
            runner = asyncio.run(
                run.measure(
                    plan,
                    keys,
                    folder,
                    show=lambda done, planned, name: progress.show("images", done, planned),
                )
            )
        if runner.measurement.is_interrupted:
            note("stopped; writing the report of what was measured")
        try:
            told = run.report(
                plan,
                runner,
                folder,
                command=_command(keys),
                encoder=_encoder(encoder, runner.measurement.samples),
            )
        except OSError as error:
            note(
                f"cannot write the report to {path}: {error.strerror}; requests.csv has the samples"
            )
            return 1
    _print(told)
    print(path / HTML)
    if told["interrupted"]:
        return run.INTERRUPTED
    return 0 if all(each["completed"] for each in told["targets"].values()) else 1


def _encoder(choice: str, samples: Sequence[Any]) -> "Encoder | None":
    """What likeness is measured with; None where there is nothing to measure or none is wanted."""
    if choice == "none" or not any(sample.outputs for sample in samples):
        return None
    from redux_pipelines.errors import WeightsError
    from redux_pipelines.loading.vision import load_vision  # torch: only after the measuring

    try:
        return load_vision("" if choice == "auto" else choice)
    except WeightsError as error:
        note(f"likeness is not measured: {error}")
        return None


def _command(keys: Mapping[str, str]) -> str:
    """The command to repeat the run. Keys are not flags, but may have slipped into some text."""
    text = shlex.join(["flux-redux", *sys.argv[1:]])
    for key in filter(None, keys.values()):
        text = text.replace(key, "[key]")
    return text


def _print(told: Mapping[str, Any]) -> None:
    for name, target in told["targets"].items():
        latency = target["latency_s"]
        figures = ", ".join(
            f"{key} {each['value']:.2f} s ({each['ci95'][0]:.2f} to {each['ci95'][1]:.2f})"
            for key, each in latency.items()
            if each["value"] is not None
        )
        per_minute = target["images_per_minute"]
        speed = f", {per_minute:.1f} images a minute" if per_minute else ""
        print(f"{name}: {target['completed']} completed, {target['errors']} errors{speed}")
        if figures:
            print(f"  {figures}")
        if target["knee"]:
            print(f"  carries {target['knee']['images_per_minute']:.1f} images a minute")
    for text in told["findings"]:
        print(f"found: {text}")
