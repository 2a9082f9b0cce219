"""``make mutate``: plant each fault in a copy of the project, and see whether its tests notice.

A test suite that passes says little while nobody knows what it would miss. Exit 1 if a fault
survives, or if the tests fail without any.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mutation.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("server", "pipelines", "kernels", "weights")
_LEFT_OUT = shutil.ignore_patterns(
    *(".*", "__pycache__", "node_modules", "data", "demo-output", "bench-results", "site", "dist")
)
_PASSED, _FAILED = 0, 1  # pytest's; others say that it could not do what it was told
_TOO_SLOW = 124  # a test that hangs by a fault has not noticed it
_LIMIT_S = 900


def plant(fault: Fault, root: Path) -> str:
    """Spoil the file below ``root``; returns what it held.

    Raises:
        ValueError: what is to be spoiled is not there exactly once.
    """
    path = root / fault.path
    whole = path.read_text()
    count = whole.count(fault.text)
    if count != 1:
        raise ValueError(f"{fault.name}: {fault.path} has its text {count} times, not once")
    path.write_text(whole.replace(fault.text, fault.spoiled))
    return whole


def tested(node_ids: Sequence[str], root: Path) -> tuple[int, str]:
    """pytest's exit status and its last lines, in the copy at ``root``; at the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not clients and not pictures and not cluster", *node_ids]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(root / package) for package in PACKAGES),
        "PYTHONDONTWRITEBYTECODE": "1",  # two edits of one second would look like one
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return _TOO_SLOW, f"still running after {_LIMIT_S} s"
    return done.returncode, "\n".join(done.stdout.splitlines()[-12:])


def survivors(faults: Sequence[Fault], root: Path) -> list[str]:
    """Names of the faults that no test noticed, or that could not be tried.

    Tests that fail without any fault would say nothing of those that are theirs.
    """
    found = []
    sound: dict[tuple[str, ...], bool] = {}
    for fault in faults:
        if fault.tests not in sound:
            status, tail = tested(fault.node_ids, root)
            sound[fault.tests] = status == _PASSED
            if status != _PASSED:
                print(f"{tail}\npytest exit {status} without any fault: {' '.join(fault.node_ids)}")
        if not sound[fault.tests]:
            found.append(fault.name)
            continue
        began = time.monotonic()
        whole = plant(fault, root)
        try:
            status, tail = tested(fault.node_ids, root)
        finally:
            (root / fault.path).write_text(whole)
        outcome = {_FAILED: "noticed", _PASSED: "SURVIVED"}.get(status, f"pytest exit {status}")
        took_s = time.monotonic() - began
        print(f"{outcome:<9} {fault.promise:<12} {fault.name:<32} {took_s:5.1f} s", flush=True)
        if status != _FAILED:
            found.append(fault.name)
            if status != _PASSED:
                print(tail)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make mutate", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "only", nargs="*", help="names of faults, or of promises (default: all of both)"
    )
    only = set(parser.parse_args(arguments).only)
    known = {each for fault in FAULTS for each in (fault.name, fault.promise)}
    if only - known:
        parser.error(f"no such fault: {', '.join(sorted(only - known))}")
    faults = [each for each in FAULTS if not only or only & {each.name, each.promise}]
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        root = Path(folder) / "project"
        shutil.copytree(ROOT, root, ignore=_LEFT_OUT, symlinks=True)
        left = survivors(faults, root)
    print(f"{len(faults)} faults, {len(left)} survived" + (f": {', '.join(left)}" if left else ""))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
