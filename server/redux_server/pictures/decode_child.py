"""The process that decodes one untrusted picture. ``decode`` runs it, by file path.

Reads the file from stdin, writes one padded JSON line and then raw RGB rows to stdout. Imports the
standard library, PIL, ``redux_pipelines.images.rgb`` and ``confinement``; confines itself before it
parses a byte. Every import costs each picture its milliseconds: ``dataclasses`` alone would add a
tenth.
"""

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

HEADER_BYTES = 512
DECODER_THREADS = 2
# What each format needs beside Pillow's usual plugins. Once confined, nothing can be imported or
# opened, so a format that is added names its plugin here, and all that this imports late.
_LATE_IMPORTS = {
    "AVIF": ("PIL.AvifImagePlugin",),
    "GIF": ("copy",),
    "HEIC": ("pillow_heif",),
    "JPEG": ("PIL.MpoImagePlugin",),
    "TIFF": ("PIL.JpegImagePlugin", "numpy"),  # numpy for more than 8 bits a channel
    "WEBP": ("PIL.WebPImagePlugin",),
}
# The words of a file that says how its colours are meant. littleCMS is loaded for these alone.
_COLOUR_WORDS = {
    "AVIF": (b"prof", b"rICC", b"nclx"),
    "HEIC": (b"prof", b"rICC", b"nclx"),
    "JPEG": (b"ICC_PROFILE",),
    "PNG": (b"iCCP", b"gAMA", b"cHRM", b"cICP"),
    "TIFF": (b"",),
    "WEBP": (b"ICCP",),
}


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
        strips = _strips(data, order)
        del data
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
    import_module("redux_server.pictures.pixels")
    if any(word in data for word in _COLOUR_WORDS.get(format_name, ())):
        with suppress(ImportError):  # a Pillow without littleCMS
            import_module("redux_server.pictures.colours")
    with suppress(ImportError):  # of which the confinement tells
        import_module("ctypes")
    from PIL import Image

    Image.preinit()


def _confine(order: Order) -> str:
    """Give up what decoding does not need; returns what could not be given up, or ``""``.

    Descriptors 0, 1 and 2 are open, and no other can be, not even in their place.
    """
    from redux_server.pictures import confinement

    warnings.simplefilter("ignore")  # they are on what is dropped anyway
    warnings.filterwarnings("error", ".*exceeds limit of")  # but for a bomb
    cpu_s = math.ceil(order.limit_s) * DECODER_THREADS  # the parent's clock ends it first, if alive
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


def _strips(data: bytes, order: Order) -> "Iterator[Any]":
    """The size, and then the rows as RGB."""
    from PIL import Image

    from redux_server.pictures.pixels import srgb_strips

    if order.format == "AVIF":
        vars(import_module("PIL.AvifImagePlugin"))["DEFAULT_MAX_THREADS"] = DECODER_THREADS
    # Pillow itself refuses beyond this: from the header, before it allocates anything.
    Image.MAX_IMAGE_PIXELS = order.max_pixels

    def check(width: int, height: int) -> None:
        if width * height > order.max_pixels:
            raise _LimitError("pixels", width * height)
        if min(width, height) < order.min_side:
            raise _LimitError("small", width, height)
        if width * height > order.expected_pixels:
            raise _LimitError("larger", width * height)

    try:
        strips = srgb_strips(order.format, data, check, order.min_side)
        del data
        yield next(strips)
        for strip in strips:
            yield strip.tobytes()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _LimitError("pixels", *_first_number(str(error))) from error


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
