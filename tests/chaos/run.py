"""Long trials of the whole server: kills, partitions, clocks, full disks; and what clients saw.

storm     kill -9 at random until so many kills and so many accepted tasks are reached; with --all
          every kind of fault is struck, until there were so many strikes
soak      every kind of fault, mixed, for some minutes with each of several seeds
faults    each kind of fault alone, some times over: which of them loses anything?
overload  ten times more than one server can do, for a minute: what is refused, and how

Each runs over the engines that are named: local (one machine, SQLite), sql and celery (two API
nodes and three workers over a PostgreSQL, a RabbitMQ and an S3 of their own, started here). Prints
a table, and writes JSON and Markdown to --out. Exit code 1: a promise was broken.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from chaos.clients import Habits
from chaos.distributed import Distributed
from chaos.embedded import DISK_MIB, TMP_MIB, Embedded
from chaos.faults import Fault
from chaos.harm import small_disk
from chaos.overload import overload
from chaos.real_pictures import real_pictures
from chaos.report import markdown
from chaos.services import Missing
from chaos.storm import PATIENCE_S, Finding, Goal, Scenario, Storm, environment

ENGINES = ("local", "sql", "celery")
BUGS = (
    *("no-fence", "no-reconciler"),
    *("killed-means-damaged", "no-watchdog", "full-means-failed"),
)
Trials = Iterator[tuple[str, Finding]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="storm", choices=(*_TRIALS, "overload"))
    parser.add_argument("--engines", default="local,celery", help="of local, sql, celery")
    parser.add_argument("--kills", type=int, default=200, help="storm: so many (default 200)")
    parser.add_argument("--all", action="store_true", help="storm: strike with all faults")
    parser.add_argument("--tasks", type=int, default=5000, help="storm: so many (default 5000)")
    parser.add_argument(
        "--at-most", type=float, default=90.0, help="storm: minutes, whatever is reached by then"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the (first) run")
    parser.add_argument("--seeds", type=int, default=10, help="soak: how many (default 10)")
    parser.add_argument("--minutes", type=float, default=2.0, help="soak: each (default 2)")
    parser.add_argument("--times", type=int, default=3, help="faults: each so often (default 3)")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--seconds", type=float, default=60, help="overload: how long (default 60)")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--plant", choices=BUGS, default="", help="a bug that must be found")
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    options = parser.parse_args()
    if options.what == "overload":
        return _overload(options)
    engines = options.engines.split(",")
    unknown = set(engines) - set(ENGINES)
    if unknown:
        parser.error(f"--engines takes some of {', '.join(ENGINES)}; got {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is to be ended
    try:
        return max(_run(engine, options) for engine in engines)
    except Missing as reason:
        print(f"cannot run: {reason}", file=sys.stderr)
        return 2


def _run(engine: str, options: argparse.Namespace) -> int:
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10_000)
    began = time.time()
    findings: list[tuple[str, Finding]] = []
    report: dict[str, Any] = {}
    for name, finding in _TRIALS[options.what](engine, seed, options):
        findings.append((name, finding))
        report = {
            "what": options.what,
            "engine": engine,
            "planted": options.plant,
            "command": f"{options.what} {' '.join(sys.argv[2:])}",
            "environment": _environment(),
            "minutes": round((time.time() - began) / 60, 1),
            "runs": [{"name": name, **found.report()} for name, found in findings],
        }
        _write(
            report, options.out / f"{options.what}-{engine}{options.plant and '-'}{options.plant}"
        )
    print(markdown(report), flush=True)
    return 0 if all(found.is_good for _, found in findings) else 1


def _overload(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="flux-redux-chaos-") as folder:
        found = {
            "what": "overload",
            "environment": _environment(),
            **overload(Path(folder), seconds=options.seconds),
        }
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    (options.out / "overload.json").write_text(text + "\n")
    print(text)
    return 0 if found["most_open"] <= found["max_queue"] else 1


def storm(engine: str, seed: int, options: argparse.Namespace) -> Trials:
    """Row 1 of the figures: kills alone, many of them, over many tasks."""
    with scenario(engine, seed, options.plant) as running:
        kills = [
            fault
            for fault in running.faults()
            if (fault.kills or options.all) and options.only in fault.name
        ]
        goal = Goal(options.tasks, options.kills, at_most_s=options.at_most * 60)
        yield f"seed {seed}", _storm(running, kills, seed, goal, options)


def soak(engine: str, seed: int, options: argparse.Namespace) -> Trials:
    """Row 2: all faults, mixed; a new scenario for each seed."""
    for number in range(seed, seed + options.seeds):
        with scenario(engine, number, options.plant) as running:
            faults = [fault for fault in running.faults() if options.only in fault.name]
            goal = Goal(seconds=options.minutes * 60)
            yield f"seed {number}", _storm(running, faults, number, goal, options)


def each_fault(
    engine: str, seed: int, options: argparse.Namespace
) -> Iterator[tuple[str, Finding]]:
    """Row 13: each fault by itself, over one scenario."""
    with scenario(engine, seed, options.plant) as running:
        for fault in running.faults():
            if options.only in fault.name:
                goal = Goal(tasks=40 * options.times, strikes=options.times)
                yield fault.name, _storm(running, [fault], seed, goal, options)


_TRIALS = {"storm": storm, "soak": soak, "faults": each_fault}


def _storm(
    running: Scenario, faults: list[Fault], seed: int, goal: Goal, options: argparse.Namespace
) -> Finding:
    assert faults, f"no fault has {options.only!r} in its name"

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {running.name}, seed {seed}: {text}", flush=True)

    patience_s = 45.0 if options.plant else PATIENCE_S
    storm = Storm(
        running,
        faults,
        seed,
        clients=options.clients,
        habits=Habits(pictures=real_pictures()),
        say=say,
        patience_s=patience_s,
    )
    found = storm.run(goal)
    if not found.is_good:
        folder = options.out / f"logs-{running.name}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        running.save_logs(folder)
    return found


@contextmanager
def scenario(engine: str, seed: int, plant: str = "") -> Iterator[Scenario]:
    """A running one, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="flux-redux-chaos-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the database runs as another user
        with ExitStack() as disks:
            env = environment(plant)
            running: Scenario
            if engine == "local":
                disk = disks.enter_context(small_disk(folder / "disk", DISK_MIB))
                tmp = disks.enter_context(small_disk(folder / "tmp", TMP_MIB))
                running = Embedded(folder, env=env, disk=disk, tmp=tmp)
            else:
                running = Distributed(folder, engine, env=env, seed=seed)
            try:
                running.start()
                yield running
            finally:
                running.stop()


def _environment() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "python": platform.python_version(),
            "load": [round(each, 1) for each in os.getloadavg()]}  # fmt: skip


def _write(report: dict[str, Any], stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_name(f"{stem.name}.md").write_text(markdown(report) + "\n")


if __name__ == "__main__":
    sys.exit(main())
