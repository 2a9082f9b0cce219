"""Installs clients of others, each at its pinned version, into an environment of its own.

A folder of pins holds ``requirements.txt`` (a virtual environment is made) or ``package.json`` and
``package-lock.json`` (a ``node_modules``). What was made is kept below ``.clients/`` for as long as
its pins and its Python or Node stay the same; two runs at once make it once. Knows no client.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PINS = Path(__file__).parent / "pins"
CACHE = ROOT / ".clients"
INSTALL_TIMEOUT_S = 900
VERSIONS = {
    "package.json": r'"version": "([^"]+)"',
    "manifest.yaml": r"^version: (\S+)",
    "pom.xml": r"<version>([^<]+)</version>",
}
UNREACHABLE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError"
    r"|Network is unreachable|Connection (refused|reset|broken)|No route to host"
    r"|\b(ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ENETUNREACH|EHOSTUNREACH|ETIMEDOUT)\b"
)


class NotInstalledError(Exception):
    """The environment cannot be made here; the text says why."""


@dataclass(frozen=True)
class Environment:
    """An installed client: ``folder`` holds ``bin`` or ``node_modules``."""

    name: str
    folder: Path

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.folder / "bin/python")

    @property
    def modules(self) -> Path:
        """Its Node packages."""
        return self.folder / "node_modules"

    @property
    def path(self) -> str:
        """``PATH`` with its commands first."""
        own = (self.folder / "bin", self.modules / ".bin")
        return os.pathsep.join([*map(str, own), os.environ.get("PATH", os.defpath)])


@cache
def environment(name: str) -> Environment:
    """The environment of ``pins/<name>``; skips the test where it cannot be made.

    Fails it where the registry was reached and did not have what is pinned. No name: an empty one.
    """
    if not name:
        return Environment("", CACHE / "nothing")
    try:
        return install(PINS / name, CACHE)
    except NotInstalledError as reason:
        pytest.skip(f"{name}: {reason}")


def checkout(name: str) -> str:
    """The checkout of that name in the folder CLIENT_SOURCES; skips where there is none."""
    folder = os.environ.get("CLIENT_SOURCES", "")
    place = Path(folder) / name
    if not folder or not place.exists():
        pytest.skip("in no registry, and CLIENT_SOURCES names no checkout")
    return str(place.resolve())


def packages_of(source: str) -> Environment:
    """The Node packages that a checkout's own lock file names; skips where they cannot be had."""
    pins = CACHE / "locks" / Path(source).name
    pins.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(Path(source) / name, pins)
    try:
        return install(pins, CACHE)
    except NotInstalledError as reason:
        pytest.skip(f"{pins.name}: {reason}")


def version_of(source: str) -> str:
    """What version a checkout says it is; its commit, where it says none; nothing if neither."""
    for name, pattern in VERSIONS.items():
        place = Path(source) / name
        if place.is_file() and (found := re.search(pattern, place.read_text(), re.MULTILINE)):
            return found[1]
    if not (Path(source) / ".git").exists():
        return ""
    command = ["git", "-C", source, "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def install(pins: Path, cache_folder: Path) -> Environment:
    """Make the environment of ``pins`` below ``cache_folder``, or find it made.

    Raises:
        NotInstalledError: node or npm is missing, or no registry is reached.
        AssertionError: the installer ended with another error.
    """
    make = _make_node if (pins / "package.json").is_file() else _make_python
    folder = cache_folder / f"{pins.name}-{_digest(pins, make is _make_node)}"
    cache_folder.mkdir(parents=True, exist_ok=True)
    # Scripts of a virtual environment name their folder, so it cannot be made aside and renamed.
    with _locked(folder.with_name(f"{folder.name}.lock")):
        done = folder / ".complete"
        if not done.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(pins, folder)
            done.touch()
    return Environment(pins.name, folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the system when its holder dies
        yield


def _digest(pins: Path, is_node: bool) -> str:
    """A name for what would be installed: the pins and what they are installed for."""
    digest = hashlib.sha256(_node_version().encode() if is_node else sys.version.encode())
    for path in sorted(pins.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _make_python(pins: Path, folder: Path) -> None:
    # pip of this interpreter installs into the new one: a pip in each would take ten seconds more.
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    options = ("--quiet", "--no-input", "--no-deps", "--no-compile", "--retries=1", "--timeout=30")
    into = ("--python", str(folder / "bin/python"))
    wanted = ("install", *options, "-r", str(pins / "requirements.txt"))
    _run([sys.executable, "-m", "pip", *into, *wanted], folder)


def _make_node(pins: Path, folder: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(pins / name, folder)
    options = ("--no-audit", "--no-fund", "--ignore-scripts", "--no-update-notifier")
    retries = {
        "npm_config_fetch_retries": "1",
        "npm_config_fetch_retry_mintimeout": "1000",
        "npm_config_fetch_retry_maxtimeout": "5000",
    }
    _run(["npm", "ci", *options], folder, retries)


@cache
def _node_version() -> str:
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            raise NotInstalledError(f"{command} is not installed")
    done = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _run(command: list[str], folder: Path, env: Mapping[str, str] | None = None) -> None:
    """Run an installer; its output is in the exception if it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    if done.returncode == 0:
        return
    said = done.stdout + done.stderr
    if found := UNREACHABLE.search(said):
        raise NotInstalledError(f"the package registry is not reached ({found[0]})")
    raise AssertionError(f"{' '.join(command[:4])} ended with {done.returncode}:\n{said[-3000:]}")
