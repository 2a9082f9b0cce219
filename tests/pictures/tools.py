"""Other people's encoders, as Debian has them: each is run on files in a folder of its own."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from pictures.case import Array, Skip
from pictures.png_writer import GREY, GREY_ALPHA, RGB, RGBA, png

PACKAGES = {
    "cjpeg": "libjpeg-turbo-progs",
    "jpegtran": "libjpeg-turbo-progs",
    "cwebp": "webp",
    "avifenc": "libavif-bin",
    "heif-enc": "libheif-examples",
    "cjxl": "libjxl-tools",
    "tiffcp": "libtiff-tools",
    "convert": "imagemagick",
}


def run(tool: str, *arguments: str, out: str, **files: bytes) -> bytes:
    """The file ``out`` that a tool writes; ``files`` are there before it starts.

    Of a name in ``files`` the last underscore stands for the dot: ``in_png`` is ``in.png``.
    Raises ``Skip`` where the tool is not there, or cannot do this.
    """
    path = f"/usr/bin/{tool}" if Path(f"/usr/bin/{tool}").exists() else shutil.which(tool)
    if path is None:
        raise Skip(f"no {tool} (Debian, Ubuntu: apt install {PACKAGES[tool]})")
    with tempfile.TemporaryDirectory(prefix="redux-corpus-") as folder:
        for name, data in files.items():
            Path(folder, ".".join(name.rsplit("_", 1))).write_bytes(data)
        done = subprocess.run(
            [path, *arguments], cwd=folder, capture_output=True, timeout=120, check=False
        )
        made = Path(folder, out)
        if done.returncode or not made.exists():
            said = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise Skip(f"this {tool} cannot do it: {said[-200:]}")
        return made.read_bytes()


def as_png(samples: Array, bits: int = 8, **chunks: bytes) -> bytes:
    """A PNG of (h, w, 1 to 4) samples, for encoders to read."""
    colour = {1: GREY, 2: GREY_ALPHA, 3: RGB, 4: RGBA}[samples.shape[2]]
    return png(samples.astype(np.int64), bits, colour, **chunks)


def as_pnm(samples: Array) -> bytes:
    """A PGM or PPM of (h, w, 1 or 3) samples of 8 bits."""
    height, width, channels = samples.shape
    magic = {1: b"P5", 3: b"P6"}[channels]
    return magic + b"\n%d %d\n255\n" % (width, height) + samples.astype(np.uint8).tobytes()
