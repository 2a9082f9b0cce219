"""The process that decodes one untrusted picture. ``decode`` runs it, by file path.

Reads the file from stdin, writes one padded JSON line and then raw RGB rows to stdout. Imports the
standard library, PIL and ``redux_pipelines.images.rgb``; confines itself before it parses a byte.
Every import costs each picture its milliseconds: ``dataclasses`` alone would add a tenth.
"""

import io
import json
import math
import os
import resource
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

HEADER_BYTES = 512
STRIP_BYTES = 2**20
AVIF_THREADS = 2
_LATE_IMPORTS = {
    "AVIF": ("PIL.AvifImagePlugin",),
    "GIF": ("copy",),
    "JPEG": ("PIL.MpoImagePlugin",),
    "WEBP": ("PIL.WebPImagePlugin",),
}
_HARMLESS_WARNINGS = ("Corrupt EXIF data", "Truncated File Read", "Image appears to be a malf")


class Order(NamedTuple):
    """What to decode and within which limits. ``format`` is Pillow's name, such as ``"PNG"``."""

    format: str
    max_pixels: int
    min_side: int
    memory_bytes: int
    limit_s: float
    import_path: tuple[str, ...]

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
        to_rgb = _load_code(order.format, data)
        _confine(order)
    except Exception as error:
        _write_header({"setup": repr(error)[:200]})
        return
    try:
        image = _decode(data, order, to_rgb)
    except _LimitError as refusal:
        _write_header({"error": refusal.slug, "numbers": refusal.numbers})
    except MemoryError:
        _write_header({"error": "memory", "numbers": []})
    except Exception:
        _write_header({"error": "broken", "numbers": []})
    else:
        _write_header({"size": image.size})
        _write_rows(image)


def _load_code(format_name: str, data: bytes) -> "Callable[[Image], Image]":
    """Import all that decoding needs, as no file can be opened afterwards."""
    for module in ("PIL.TiffImagePlugin", *_LATE_IMPORTS.get(format_name, ())):
        import_module(module)
    if format_name == "PNG" and data[24:26] == b"\x10\0":  # 16-bit grey is scaled by numpy
        import_module("numpy")
    from PIL import Image

    from redux_pipelines.images.rgb import to_rgb

    Image.preinit()
    return to_rgb


def _confine(order: Order) -> None:
    """Give up what decoding does not need. Descriptors 0, 1 and 2 are open, no more can be."""
    warnings.simplefilter("error")
    for message in _HARMLESS_WARNINGS:  # on metadata that is dropped anyway
        warnings.filterwarnings("ignore", message)
    cpu_s = math.ceil(order.limit_s) * AVIF_THREADS  # the parent's clock ends it first, if alive
    limits = [
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),  # SIGXCPU first: tells "slow" from a crash
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NOFILE, 3, 3),
    ]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_AS, order.memory_bytes, order.memory_bytes))
    for kind, soft, hard in limits:
        given = resource.getrlimit(kind)[1]
        most = hard if given == resource.RLIM_INFINITY else min(hard, given)
        resource.setrlimit(kind, (min(soft, most), most))


def _decode(data: bytes, order: Order, to_rgb: "Callable[[Image], Image]") -> "Image":
    from PIL import Image

    if order.format == "AVIF":
        vars(import_module("PIL.AvifImagePlugin"))["DEFAULT_MAX_THREADS"] = AVIF_THREADS
    # Pillow itself refuses beyond this: from the header, before it allocates anything.
    Image.MAX_IMAGE_PIXELS = order.max_pixels
    try:
        opened = Image.open(io.BytesIO(data), formats=[order.format])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _LimitError("pixels", *_first_number(str(error))) from error
    with opened:
        width, height = opened.size
        if width * height > order.max_pixels:
            raise _LimitError("pixels", width * height)
        if min(width, height) < order.min_side:
            raise _LimitError("small", width, height)
        still = opened.copy()
    del opened  # with it go the canvases a decoder holds: 0.3 GiB for 40 MP of WebP
    return to_rgb(still)


def _first_number(text: str) -> list[int]:
    digits = "".join(c if c.isdigit() else " " for c in text).split()
    return [int(digits[0])] if digits else []


def _write_header(header: dict[str, object]) -> None:
    _write(json.dumps(header).encode().ljust(HEADER_BYTES - 1)[: HEADER_BYTES - 1] + b"\n")


def _write_rows(image: "Image") -> None:
    width, height = image.size
    rows = max(1, STRIP_BYTES // (3 * width))
    for top in range(0, height, rows):
        _write(image.crop((0, top, width, min(top + rows, height))).tobytes())


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


if __name__ == "__main__":
    main()
