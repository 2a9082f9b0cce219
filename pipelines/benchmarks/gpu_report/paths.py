"""Where Python finds what the report needs: this project's folders, and the bundle's wheels.

The project comes first, the bundle last: of what is installed already, that is taken. Imports
nothing but the standard library, for it runs before anything else can be imported.
"""

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BUNDLE = ROOT / "gpu-bundle"
"""Wheels that ``make gpu-bundle`` gathered; not there where everything is installed."""
FOLDERS = ("server", "pipelines", "kernels", "weights", "kernels/benchmarks")


def set_up(bundle: Path = BUNDLE) -> None:
    """Let this process import the project, and what the bundle holds beside it."""
    folders = [str(ROOT / folder) for folder in FOLDERS]
    sys.path[:0] = [each for each in folders if each not in sys.path]
    wheels = sorted(bundle.glob("*.whl"))
    if wheels:
        sys.path.append(str(unpacked(wheels)))


def unpacked(wheels: Sequence[Path], parent: Path | None = None) -> Path:
    """The folder with what ``wheels`` hold, below the temporary one; made if it is not there.

    Made beside its place and then moved there, so that it is whole or absent.
    """
    names = "\n".join(wheel.name for wheel in wheels)
    name = f"flux-redux-gpu-bundle-{os.getuid()}-{hashlib.sha256(names.encode()).hexdigest()[:16]}"
    parent = parent or Path(tempfile.gettempdir())
    folder = parent / name
    if folder.is_dir():
        return folder
    made = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(made)
    try:
        made.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(made, ignore_errors=True)
    return folder
