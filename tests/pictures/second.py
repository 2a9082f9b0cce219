"""What another decoder makes of a file: libvips through pyvips, or ImageMagick.

Both are asked for RGB in sRGB, upright, on white. They decide nothing alone: where one of them
differs from what a case expects, the case is wrong or says why it does not ask.
"""

import os
import shutil
import subprocess
from functools import cache
from typing import Any

import numpy as np

from pictures.case import Array, Skip


def shown_by(decoder: str, data: bytes) -> Array:
    """(height, width, 3) of uint8. Raises ``Skip`` where the decoder is not there."""
    return {"vips": _by_vips, "magick": _by_magick}[decoder](data)


@cache
def _vips() -> Any:
    os.environ.setdefault("VIPS_WARNING", "0")
    try:
        import pyvips
    except (ImportError, OSError) as error:
        raise Skip("no libvips for pyvips (Debian, Ubuntu: apt install libvips42)") from error
    return pyvips


def _by_vips(data: bytes) -> Array:
    image = _vips().Image.new_from_buffer(data, "").autorot()
    if image.get_typeof("icc-profile-data"):
        image = image.icc_transform("srgb", embedded=True, intent="perceptual")
    elif image.interpretation not in ("srgb", "b-w"):
        image = image.colourspace("srgb")
    if image.hasalpha():
        image = image.flatten(background=[255] * (image.bands - 1))
    if image.bands == 1:
        image = image.bandjoin([image, image])
    image = image.cast("uchar")
    found = np.frombuffer(image.write_to_memory(), np.uint8)
    return found.reshape(image.height, image.width, image.bands)


def _by_magick(data: bytes) -> Array:
    path = next((p for p in ("/usr/bin/convert", "/usr/bin/magick") if os.path.exists(p)), None)
    path = path or shutil.which("magick") or shutil.which("convert")
    if path is None:
        raise Skip("no ImageMagick (Debian, Ubuntu: apt install imagemagick)")
    command = [path, "-[0]", "-auto-orient", "-background", "white", "-alpha", "remove"]
    command += ["-colorspace", "sRGB", "-depth", "8", "ppm:-"]
    done = subprocess.run(command, input=data, capture_output=True, check=True, timeout=60)
    magic, size, most, pixels = done.stdout.split(b"\n", 3)
    assert magic == b"P6" and most == b"255"
    width, height = map(int, size.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
