"""Compiled code that outlives the process: a private folder per network and kind of machine.

torch fills it by itself (``TORCHINDUCTOR_CACHE_DIR``): graphs, kernels and a CPU's object files. A
file in the folder says what its code was made on, for code of another processor would crash. What
the folder holds is run, so it must belong to this user or root, and nobody else may write to it.
torch deletes nothing: whole folders are, those used longest ago. Knows no network.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

MAX_FOLDERS = 8
"""Folders kept; those used longest ago are deleted."""

CPU_INFO = Path("/proc/cpuinfo")
_FACTS = "facts.json"

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
class KeptCode:
    """A folder of compiled code as its own file describes it."""

    path: Path
    facts: Facts
    size_bytes: int


def kept_code(directory: Path) -> Iterator[KeptCode]:
    """The folders in ``directory`` that say what they were made on; nothing of them is loaded."""
    for path in sorted(directory.glob(f"*/{_FACTS}")):
        try:
            facts = dict(json.loads(path.read_text()))
            yield KeptCode(path.parent, facts, _size(path.parent))
        except (OSError, ValueError, TypeError):
            continue  # not a folder of ours, or a damaged one


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _keep_headers(folder: Path) -> None:
    """Have torch keep there, too, the C++ headers that it compiles first on a CPU.

    It keeps them in the temporary folder whatever it is told, which a worker has a new one of at
    each start.
    """
    from torch._inductor import codecache

    if hasattr(codecache, "_HEADER_DIR"):  # not every torch that we allow has it
        codecache._HEADER_DIR = str(folder)
        codecache._HEADER_LOCK_DIR = str(folder / "locks")


class CodeFolder:
    """The folder in ``directory`` for compiled code that depends on ``facts``."""

    def __init__(self, directory: Path, facts: Facts) -> None:
        self._facts = json.dumps(dict(facts), sort_keys=True)
        self.path = directory / hashlib.sha256(self._facts.encode()).hexdigest()[:24]
        self._headers = directory.with_name("headers")  # large, and the same for every network

    def use(self) -> bool:
        """Have torch find and keep code there from now on; whether it does.

        A folder that cannot be had, or that others could have written to, is a warning.
        """
        try:
            self._make()
        except OSError as error:
            logger.warning("compiled code is not kept in %s: %s", self.path, error)
            return False
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.path)
        _keep_headers(self._headers)
        _prune(self.path.parent)
        return True

    def discard(self) -> None:
        """Delete what is kept: it is damaged, or wrong."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _make(self) -> None:
        for folder in (self.path.parent, self.path, self._headers):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _check_owner(folder.stat())
        if not (self.path / _FACTS).exists():
            (self.path / _FACTS).write_text(self._facts)
        os.utime(self.path)


def _check_owner(found: os.stat_result) -> None:
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("others could have written to it")


def _prune(directory: Path) -> None:
    """Delete all but the folders used last, and the files of versions that packed their code."""
    folders = [(path.parent.stat().st_mtime, path.parent) for path in directory.glob(f"*/{_FACTS}")]
    for _, folder in sorted(folders, reverse=True)[MAX_FOLDERS:]:
        shutil.rmtree(folder, ignore_errors=True)
    for path in directory.glob("*.bin"):
        path.unlink(missing_ok=True)
