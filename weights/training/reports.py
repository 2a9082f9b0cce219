"""What the evaluations write beside their figures. Knows nothing of what was measured."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from redux_server import __version__

_PACKAGES = ("torch", "diffusers", "transformers")


def environment() -> dict[str, str]:
    """Kind of processor, and versions."""
    versions = {"flux-redux-server": __version__, **{name: version(name) for name in _PACKAGES}}
    return {"cpu": platform.machine(), **versions}


def rounded(value: Any) -> Any:
    """``value`` with all its floats at four digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write ``report``, rounded."""
    path.write_text(json.dumps(rounded(report), indent=2) + "\n")
