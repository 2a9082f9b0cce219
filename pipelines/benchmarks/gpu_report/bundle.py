"""``make gpu-bundle``: the wheels that a GPU machine without a network lacks for the report.

Such a machine has torch, triton, transformers, Pillow and numpy with their own needs. Everything
else that the report and the server in it import is gathered here, in the versions that are
installed where this runs: a pure wheel if there is one, else the one for Linux on x86-64. Runs
where the project is installed; measures nothing.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gpu_report.paths import BUNDLE

THERE = ("torch", "triton", "transformers", "pillow", "numpy")
"""What the machine has, with all that these need."""
NEEDED = ("diffusers", "alembic", "fastapi", "fastapi-offline", "httpcore", "httptools", "obstore",
          "prometheus-client", "pydantic", "python-multipart", "sqlalchemy", "structlog",
          "uvicorn")  # fmt: skip
"""What the report imports beside that, and the server for its stage."""
UNSURE = ("pydantic",)
"""Needed by something of that in the versions we have, but not in all: gathered nevertheless."""
MAX_BYTES = 20 * 10**6
PURE = ("--platform", "any", "--implementation", "py", "--abi", "none")
GLIBC = (28, 27, 24, 17, 5)


def main(arguments: Sequence[str]) -> int:
    """Gather the wheels; 1 if one cannot be had, or if they are too large together."""
    parser = argparse.ArgumentParser(prog="gpu-bundle", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=BUNDLE, help="a folder (%(default)s)")
    parser.add_argument("--python", default="3.12", help="the machine's (%(default)s)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for wheel in options.out.glob("*.whl"):
        wheel.unlink()
    for name in sorted(lacking(options.python)):
        wheel = download(f"{name}=={distribution(name).version}", options.python, options.out)
        print(f"{wheel.stat().st_size / 1e6:6.2f} MB  {wheel.name}", flush=True)
    size = sum(wheel.stat().st_size for wheel in options.out.glob("*.whl"))
    print(f"{size / 1e6:6.2f} MB  in {options.out}")
    if size > MAX_BYTES:
        print(f"that is more than {MAX_BYTES / 1e6:.0f} MB", file=sys.stderr)
    return int(size > MAX_BYTES)


def lacking(python: str) -> set[str]:
    """Names of the packages that a machine with ``THERE`` needs, of those installed here."""
    there = closure(THERE, python) - closure(UNSURE, python)
    return closure(NEEDED, python) - there


def closure(names: Iterable[str], python: str) -> set[str]:
    """``names`` and all that they need, as far as it is installed here, for another Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    todo, seen = [Requirement(name) for name in names], set()
    found: set[str] = set()
    while todo:
        wanted = todo.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            needs = distribution(wanted.name).requires or []
        except PackageNotFoundError:  # for another platform, or an extra that nobody asked for
            continue
        found.add(str(key[0]))
        for need in map(Requirement, needs):
            extras = wanted.extras or {""}
            if need.marker is None or any(
                need.marker.evaluate({**environment, "extra": extra}) for extra in extras
            ):
                todo.append(need)
    return found


def download(requirement: str, python: str, out: Path) -> Path:
    """One wheel in ``out``: a pure one, or else one for Linux. Exits if there is neither."""
    linux = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms = [each for name in (*linux, "manylinux2014_x86_64") for each in ("--platform", name)]
    shorthand = "cp" + python.replace(".", "")
    binary = [*platforms, "--implementation", "cp"]
    for abi in (shorthand, "abi3", "none"):
        binary += ["--abi", abi]
    said = ""
    for kind in (PURE, binary):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-input",
                "--no-deps",
            ]
            command += ["--only-binary=:all:", "--python-version", python, *kind, "-d", folder]
            done = subprocess.run(
                [*command, requirement], capture_output=True, text=True, check=False
            )
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode == 0 and wheels:
                target = out / wheels[0].name
                target.write_bytes(wheels[0].read_bytes())
                return target
            said = done.stderr
    sys.exit(f"no wheel of {requirement} for Python {python}: {said.strip()[-500:]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
