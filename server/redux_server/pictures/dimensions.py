"""How many pixels a picture's header says that it has, so that its memory is known beforehand.

A few bytes at known places are read as numbers, and nothing is decoded. What comes out is a
caller's word: the process that decodes looks again, before it needs memory.
"""

import re
import struct
from collections.abc import Callable

_ENTRIES = 100  # of a TIFF's page: they are sorted, and what is looked for comes first
_SEGMENTS = 2000  # of a JPEG that are passed over
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # T.81, table B.1: SOF0 to SOF15
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})


def pixels(format_name: str, data: bytes) -> int | None:
    """Width times height of ``data``, which is ``format_name``; None where it is not to be seen."""
    try:
        size = _READERS[format_name](data)
    except (struct.error, IndexError, KeyError):
        return None
    return size[0] * size[1] if size and min(size) > 0 else None


def _png(data: bytes) -> tuple[int, int] | None:
    width, height = struct.unpack_from(">II", data, 16)
    return (width, height) if data[12:16] == b"IHDR" else None


def _gif(data: bytes) -> tuple[int, int]:
    """The canvas: frames beyond it make it larger, as Pillow has it."""
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _bmp(data: bytes) -> tuple[int, int]:
    if data[14] == 12:  # OS/2
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return abs(width), abs(height)  # negative: the rows come from the top


def _webp(data: bytes) -> tuple[int, int] | None:
    """RFC 9649: one of three kinds of chunk comes first."""
    kind = data[12:16]
    if kind == b"VP8X":
        return _uint24(data, 24) + 1, _uint24(data, 27) + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _uint24(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little")


def _jpeg(data: bytes) -> tuple[int, int] | None:
    """From marker to marker, up to the first frame header."""
    at = 2
    for _ in range(_SEGMENTS):
        while data[at] == 0xFF and data[at + 1] == 0xFF:
            at += 1
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        at += 2 if marker in _WITHOUT_LENGTH else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _tiff(data: bytes) -> tuple[int, int] | None:
    """Of the first page; TIFF 6.0, section 2, and BigTIFF."""
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] in (b"\x2b\0", b"\0\x2b"):
        (at,) = struct.unpack_from(order + "Q", data, 8)
        (count,) = struct.unpack_from(order + "Q", data, at)
        first, size, value_at = at + 8, 20, 12
    else:
        (at,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, at)
        first, size, value_at = at + 2, 12, 8
    sides: dict[int, int] = {}
    for entry in range(first, first + size * min(count, _ENTRIES), size):
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if tag in (256, 257):
            code = {3: "H", 4: "I", 16: "Q"}.get(kind, "I")
            (sides[tag],) = struct.unpack_from(order + code, data, entry + value_at)
        if len(sides) == 2:
            return sides[256], sides[257]
    return None


def _isobmff(data: bytes) -> tuple[int, int] | None:
    """The largest of the ``ispe`` boxes (ISO/IEC 23008-12, 6.5.3), which a grid's own is."""
    head = data[: 2**16]
    sizes = [struct.unpack_from(">II", head, found.end() + 4) for found in _ISPE.finditer(head)]
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


_ISPE = re.compile(rb"\0\0\0\x14ispe")
_READERS: dict[str, Callable[[bytes], tuple[int, int] | None]] = {
    "AVIF": _isobmff,
    "BMP": _bmp,
    "GIF": _gif,
    "HEIC": _isobmff,
    "JPEG": _jpeg,
    "PNG": _png,
    "TIFF": _tiff,
    "WEBP": _webp,
}
