"""Puts the embedded model, which lies beside the packages in the source tree, into the wheel.

Not into an editable install, where a copy would go stale: there the source tree itself is used.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EmbeddedModel(BuildHookInterface):  # type: ignore[type-arg]
    """Hatch's custom build hook of the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add ``redux_weights/mini`` to a standard wheel."""
        if version == "standard":
            for part in ("base", "redux"):
                build_data["force_include"][f"weights/mini/{part}"] = f"redux_weights/mini/{part}"
