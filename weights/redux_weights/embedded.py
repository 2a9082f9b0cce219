"""Where the embedded mini model lies.

The wheel carries it inside this package (hatch_build.py puts it there); in a source tree, and so
in an editable install, it is ``weights/mini`` beside this package. Standard library only.
"""

from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The folders of a FLUX.1 base and of a Redux, both in diffusers' layout."""

    base: Path
    redux: Path


def find_mini() -> Checkpoint:
    """The embedded model's folders; whether their files are whole is ``layout``'s to say.

    Raises:
        FileNotFoundError: this installation has no embedded model.
    """
    for parent in (_PACKAGE, _PACKAGE.parent):
        found = Checkpoint(parent / "mini" / "base", parent / "mini" / "redux")
        if found.base.is_dir() and found.redux.is_dir():
            return found
    raise FileNotFoundError(
        "this installation has no embedded mini model (weights/mini of the source tree, or "
        "redux_weights/mini of the wheel): install it again"
    )
