"""The process that decodes one untrusted picture. ``decode`` runs it, by file path.

Reads the file from stdin, writes one padded JSON line and then raw RGB rows to stdout. Imports the
standard library, PIL, ``redux_pipelines.images.rgb`` and ``confinement``; confines itself before it
parses a byte. Every import costs each picture its milliseconds: ``dataclasses`` alone would add a
tenth.
"""

import io
import json
import math
import os
import resource
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from PIL.Image import Image

HEADER_BYTES = 512
STRIP_BYTES = 2**20
AVIF_THREADS = 2
# What each format needs beside Pillow's usual plugins. Once confined, nothing can be imported or
# opened, so a format that is added names its plugin here, and all that this imports late.
_LATE_IMPORTS = {
    "AVIF": ("PIL.AvifImagePlugin",),
    "GIF": ("copy",),
    "JPEG": ("PIL.MpoImagePlugin",),
    "WEBP": ("PIL.WebPImagePlugin",),
}
# Their decoders hold canvases as large as the picture for as long as it is open.
_HOLD_CANVASES = ("AVIF", "WEBP")
_HARMLESS_WARNINGS = ("Corrupt EXIF data", "Truncated File Read", "Image appears to be a malf")


class Order(NamedTuple):
    """What to decode and within which limits. ``format`` is Pillow's name, such as ``"PNG"``.

    ``memory_bytes`` may be used beside what the process has at its start. They are enough for
    ``expected_pixels``: of a picture that has more, only its size is told.
    """

    format: str
    max_pixels: int
    min_side: int
    memory_bytes: int
    limit_s: float
    import_path: tuple[str, ...]
    expected_pixels: int = sys.maxsize

    def to_json(self) -> str:
        """The order as the one argument of the child."""
        return json.dumps(self._asdict())


class _LimitError(Exception):
    """A sound picture that breaks a limit: a slug and the numbers for the message."""

    def __init__(self, slug: str, *numbers: int) -> None:
        super().__init__(slug)
        self.slug = slug
        self.numbers = numbers


def main() -> None:
    """Decode stdin to stdout as ``argv[1]`` says; every failure becomes a header too."""
    order = Order(**json.loads(sys.argv[1]))
    sys.path.extend(order.import_path)
    data = sys.stdin.buffer.read()
    try:
        _load_code(order.format, data)
        unconfined = _confine(order)
    except Exception as error:
        passing = isinstance(error, OSError | MemoryError)  # of the machine, not of its packages
        _write_header({"setup": repr(error)[:200], "passing": passing})
        return
    try:
        strips = _strips(_decode(data, order))
        size = next(strips)
        first = next(strips)
    except _LimitError as refusal:
        _write_header({"error": refusal.slug, "numbers": refusal.numbers})
    except MemoryError:
        _write_header({"error": "memory", "numbers": []})
    except Exception:
        _write_header({"error": "broken", "numbers": []})
    else:
        _write_header({"size": size, "unconfined": unconfined})
        _write(first)
        for strip in strips:
            _write(strip)


def _load_code(format_name: str, data: bytes) -> None:
    """Import all that decoding needs, as no file can be opened afterwards."""
    for module in ("PIL.TiffImagePlugin", *_LATE_IMPORTS.get(format_name, ())):
        import_module(module)
    if format_name == "PNG" and data[24:26] == b"\x10\0":  # 16-bit grey is scaled by numpy
        import_module("numpy")
    for module in ("PIL.ImageOps", "redux_pipelines.images.rgb"):
        import_module(module)
    with suppress(ImportError):  # of which the confinement tells
        import_module("ctypes")
    from PIL import Image

    Image.preinit()


def _confine(order: Order) -> str:
    """Give up what decoding does not need; returns what could not be given up, or ``""``.

    Descriptors 0, 1 and 2 are open, and no other can be, not even in their place.
    """
    from redux_server.pictures import confinement

    warnings.simplefilter("error")
    for message in _HARMLESS_WARNINGS:  # on metadata that is dropped anyway
        warnings.filterwarnings("ignore", message)
    cpu_s = math.ceil(order.limit_s) * AVIF_THREADS  # the parent's clock ends it first, if alive
    limits = [
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),  # SIGXCPU first: tells "slow" from a crash
        (resource.RLIMIT_FSIZE, 0, 0),
    ]
    if sys.platform == "linux":
        most = _address_space() + order.memory_bytes
        limits.append((resource.RLIMIT_AS, most, most))
    limits.append((resource.RLIMIT_NOFILE, 0, 0))
    for kind, soft, hard in limits:
        given = resource.getrlimit(kind)[1]
        most = hard if given == resource.RLIM_INFINITY else min(hard, given)
        resource.setrlimit(kind, (min(soft, most), most))
    return confinement.confine()


def _address_space() -> int:
    """How many bytes of it this process has; proc(5) has the format."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _decode(data: bytes, order: Order) -> "Image":
    """The pixels, upright."""
    from PIL import Image, ImageOps

    if order.format == "AVIF":
        vars(import_module("PIL.AvifImagePlugin"))["DEFAULT_MAX_THREADS"] = AVIF_THREADS
    # Pillow itself refuses beyond this: from the header, before it allocates anything.
    Image.MAX_IMAGE_PIXELS = order.max_pixels
    try:
        opened = Image.open(io.BytesIO(data), formats=[order.format])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _LimitError("pixels", *_first_number(str(error))) from error
    width, height = opened.size
    if width * height > order.max_pixels:
        raise _LimitError("pixels", width * height)
    if min(width, height) < order.min_side:
        raise _LimitError("small", width, height)
    if width * height > order.expected_pixels:
        raise _LimitError("larger", width * height)
    opened.load()
    image = opened.copy() if order.format in _HOLD_CANVASES else opened
    del opened
    with suppress(SyntaxError, ValueError, KeyError, TypeError, OSError):  # broken EXIF
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _strips(image: "Image") -> "Iterator[Any]":
    """The size, and then the rows as RGB, in parts: a whole picture more would be too many."""
    from redux_pipelines.images.rgb import opaque_rgb

    width, height = image.size
    yield width, height
    if image.mode in ("I", "F"):  # scaled by their largest value
        image = opaque_rgb(image)
    rows = max(1, STRIP_BYTES // (3 * width))
    for top in range(0, height, rows):
        yield opaque_rgb(image.crop((0, top, width, min(top + rows, height)))).tobytes()


def _first_number(text: str) -> list[int]:
    digits = "".join(c if c.isdigit() else " " for c in text).split()
    return [int(digits[0])] if digits else []


def _write_header(header: dict[str, object]) -> None:
    _write(json.dumps(header).encode().ljust(HEADER_BYTES - 1)[: HEADER_BYTES - 1] + b"\n")


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


if __name__ == "__main__":
    main()
