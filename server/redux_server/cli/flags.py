"""Flags that are no settings, and quantities with a unit as flags take them."""

import re
from collections.abc import Mapping
from typing import Any

_PER_MINUTE = {"": 1.0, "/min": 1.0, "/s": 60.0, "/h": 1 / 60}
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def rate(text: str) -> float:
    """``30``, ``30/min``, ``0.5/s`` or ``100/h`` as so many a minute."""
    return _with_unit(text, _PER_MINUTE)


def seconds(text: str) -> float:
    """``10``, ``10s``, ``500ms``, ``5m`` or ``1h`` as seconds."""
    return _with_unit(text, _SECONDS)


def _with_unit(text: str, units: Mapping[str, float]) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z/]*)", text.strip(), re.ASCII)
    if match is None or match[2] not in units:
        raise ValueError(text)
    return float(match[1]) * units[match[2]]


class Flag:
    """A flag or an argument that is no setting: what ``add_argument`` takes, and its group."""

    def __init__(self, *names: str, group: str = "", **options: Any) -> None:
        self.names, self.group, self.options = names, group, options

    @property
    def dest(self) -> str:
        """The name under which its value is parsed."""
        longest = max(self.names, key=len).lstrip("-").replace("-", "_")
        return str(self.options.get("dest", longest))

    @property
    def usage(self) -> str:
        """How it stands in the line of usage: not at all, if it may be left out."""
        if not self.names[0].startswith("-"):
            return f" {self.options['metavar']}"
        return f" {self.names[0]} {self.options['metavar']}" if "required" in self.options else ""
