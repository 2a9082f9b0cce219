"""What a figure depends on, to be kept beside it, and where both are kept.

Runs from a copy of the sources as well as installed. Knows no benchmark.
"""

import json
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "diffusers", "transformers")
_SOURCES = Path(__file__).resolve().parents[2]


def environment(device: str = "cpu", **others: Any) -> dict[str, Any]:
    """Processor, GPU if ``device`` is one, load and versions; ``others`` are the run's own."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "cpu": _cpu_name(),
        "gpu": gpu,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {"flux-redux-server": own_version(), **_versions()},
        **others,
    }


def own_version() -> str:
    """That of the sources which this file is part of; they need not be installed."""
    text = (_SOURCES / "server/redux_server/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return found[1] if found else "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def save(report: Mapping[str, Any], out: Path) -> str:
    """Write ``report`` to ``out`` as JSON, all of it or nothing; returns the text.

    To be called before the first case, so that an environment or a place that cannot be told is
    known before minutes are spent, and after each: a run that is cut off keeps what it has.
    """
    text = json.dumps(report, indent=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    part.write_text(text + "\n")
    part.replace(out)
    return text


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
