"""Compiled code that outlives the process: torch's cache artifacts, one file per kind of machine.

A file starts with one line that says what it was made on; it is used only where every fact of that
line is the same, for code of another processor would crash. Loading one runs what it holds: only
files that belong to this user or root, and that nobody else may write, are read. Whatever is wrong
with a file is a warning, and it is written anew. A CPU's object files are not in it: torch has them
in its ``TORCHINDUCTOR_CACHE_DIR`` and builds them again where that is empty. Knows no network.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

MAX_FILES = 8
"""Files kept in a directory; those used longest ago are deleted."""

CPU_INFO = Path("/proc/cpuinfo")
_MAGIC = "flux-redux compile artifacts 1"
_MAX_HEADER_BYTES = 64 * 1024

Facts = Mapping[str, str]


def machine_facts(device: torch.device) -> dict[str, str]:
    """What compiled code depends on besides the network: processor, torch, triton, CUDA."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "processor": _gpu(device) if device.type == "cuda" else _cpu(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton,
        "python": platform.python_version(),
    }


def _gpu(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"


def _cpu() -> str:
    """The processor's name and, as a digest, all it can do: code is compiled for exactly that."""
    lines = {}
    with contextlib.suppress(OSError):
        text = CPU_INFO.read_text().partition("\n\n")[0]
        pairs = (line.partition(":")[::2] for line in text.splitlines())
        lines = {key.strip(): value.strip() for key, value in pairs}
    name = lines.get("model name", platform.machine())
    able = lines.get("flags") or lines.get("Features") or torch.backends.cpu.get_cpu_capability()
    return f"{name} {hashlib.sha256(able.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file of compiled code as its first line describes it."""

    path: Path
    facts: Facts
    size_bytes: int


def kept_files(directory: Path) -> Iterator[KeptFile]:
    """The files in ``directory`` that say what they were made on; nothing of them is loaded."""
    for path in sorted(directory.glob("*.bin")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.readline(_MAX_HEADER_BYTES))
            if header["format"] == _MAGIC:
                yield KeptFile(path, dict(header["facts"]), path.stat().st_size)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a file of ours, or a damaged one


class ArtifactFile:
    """The file in ``directory`` for compiled code that depends on ``facts``."""

    def __init__(self, directory: Path, facts: Facts) -> None:
        self._facts = dict(facts)
        digest = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()
        self.path = directory / f"{digest[:24]}.bin"

    def load(self) -> int:
        """Hand the file's artifacts to torch; returns their bytes, 0 if there are none to use."""
        try:
            artifacts = self._read()
            if torch.compiler.load_cache_artifacts(artifacts) is None:
                raise ValueError("torch cannot read what it holds")
            os.utime(self.path)
        except FileNotFoundError:
            return 0
        except Exception as error:
            # Deserialising foreign bytes may raise anything, and compiling anew is always possible.
            logger.warning("compiled code in %s is not used: %s", self.path, error)
            return 0
        return len(artifacts)

    def save(self) -> int:
        """Write all that this process compiled or loaded; returns its bytes, 0 if that failed."""
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            return 0
        try:
            self._write(saved[0])
            _prune(self.path.parent)
        except OSError as error:
            logger.warning("compiled code is not kept for the next start: %s", error)
            return 0
        return len(saved[0])

    def _read(self) -> bytes:
        with self.path.open("rb") as file:
            _check_owner(os.fstat(file.fileno()))
            header = json.loads(file.readline(_MAX_HEADER_BYTES))
            artifacts = file.read()
        if not isinstance(header, dict) or header.get("format") != _MAGIC:
            raise ValueError("it is of another format")
        if header["facts"] != self._facts:
            raise ValueError("it was made on another machine")
        if header["sha256"] != hashlib.sha256(artifacts).hexdigest():
            raise ValueError("it is damaged")
        return artifacts

    def _write(self, artifacts: bytes) -> None:
        digest = hashlib.sha256(artifacts).hexdigest()
        header = {"format": _MAGIC, "facts": self._facts, "sha256": digest}
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=folder, prefix="new-", suffix=".tmp")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(header).encode() + b"\n" + artifacts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _check_owner(found: os.stat_result) -> None:
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("others could have written it")


def _prune(folder: Path) -> None:
    """Delete all but the files used last."""
    files = [(path.stat().st_mtime, path) for path in folder.glob("*.bin")]
    for _, path in sorted(files, reverse=True)[MAX_FILES:]:
        path.unlink(missing_ok=True)
