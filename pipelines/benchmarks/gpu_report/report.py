"""The report: what was found so far, on disk after each change, whole at any moment.

Holds what ``schema`` describes. Knows no stage and no network.
"""

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VERSION = 1
FILE = "gpu-report.json"


class Report:
    """A JSON file in ``folder``, replaced by each ``save``: whoever ends us finds the last one."""

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self.content = content

    @classmethod
    def begun(cls, folder: Path, *, device: str, scale: str, budget_s: float) -> "Report":
        """A new one, with nothing in it yet; one that is there is kept under the time it began."""
        _set_aside(folder / FILE)
        return cls(
            folder,
            {
                "version": VERSION,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "device": device,
                "scale": scale,
                "budget_s": budget_s,
                "total_s": 0.0,
                "stages_s": {},
                "failures": {},
                "environment": {},
            },
        )

    @classmethod
    def resumed(cls, folder: Path) -> "Report":
        """The one that a process before this one left in ``folder``."""
        return cls(folder, json.loads((folder / FILE).read_text()))

    def section(self, name: str) -> dict[str, Any]:
        """What stage ``name`` found, to be filled; empty at first."""
        found: dict[str, Any] = self.content.setdefault(name, {})
        return found

    def is_done(self, name: str) -> bool:
        """Whether stage ``name`` ran to its end, well or not."""
        return name in self.content["stages_s"] or name in self.content["failures"]

    def save(self) -> None:
        """Write all of it beside the file, then put that in the file's place."""
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(_finite(self.content), indent=1, allow_nan=False) + "\n")
        os.replace(beside, self.path)


def _set_aside(former: Path) -> None:
    """So that a part that is measured again does not cost what was measured before."""
    if not former.is_file():
        return
    try:
        began = str(json.loads(former.read_text())["started"])
    except (ValueError, KeyError, TypeError):  # not one of ours, or cut off by a full disk
        began = datetime.fromtimestamp(former.stat().st_mtime, UTC).isoformat(timespec="seconds")
    former.replace(former.with_stem(f"{former.stem}-{began.replace(':', '')}"))


def _finite(value: Any) -> Any:
    """``value`` with None for numbers that JSON does not have: a wrong kernel may give them."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
