"""What the figures depend on, to be kept beside them: GPU, driver, clocks, versions, the commit."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gpu_report import paths
from redux_pipelines.devices import slow_reason

PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "pillow")
_QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
          "power.limit", "memory.used")  # fmt: skip


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, and the GPU if ``device`` is one; None for what cannot be read."""
    return {
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(device),
        "python": platform.python_version(),
        "project": _project_version(),
        "commit": _commit(),
        "dtype": str(dtype).removeprefix("torch."),
        "slow": slow_reason(device, dtype),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "gpu": _gpu(device),
    }


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": total_bytes,
        "free_bytes": free_bytes,
        "driver": _nvidia_smi(device),
    }


def _nvidia_smi(device: torch.device) -> dict[str, str] | None:
    """Driver and clocks as they were at the start; None without ``nvidia-smi``."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    text = _output([*command, "-i", str(device.index or 0)])
    values = [each.strip() for each in (text or "").split(",")]
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else None


def _cudnn(device: torch.device) -> int | None:
    cudnn: Any = torch.backends.cudnn
    return cudnn.version() if device.type == "cuda" else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _project_version() -> str | None:
    text = (paths.ROOT / "server/redux_server/__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    return found[1] if found else None


def _commit() -> str | None:
    """Of the checkout, with ``+`` where files differ from it; None outside of one."""
    git = ["git", "-C", str(paths.ROOT)]
    head = _output([*git, "rev-parse", "HEAD"])
    if head is None:
        return None
    return head + ("+" if _output([*git, "status", "--porcelain", "-uno"]) else "")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
