"""EXIF blocks by hand (EXIF 2.32, and TIFF 6.0 for their layout)."""

import struct

MARK = b"Exif\0\0"


def exif(orientation: int, *, order: str = "<", kind: int = 3, extra: bytes = b"") -> bytes:
    """A TIFF header and one directory: orientation as SHORT (3) or LONG (4), then ``extra``."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    code = {3: "HH", 4: "I"}[kind]
    value = struct.pack(order + code, *((orientation, 0) if kind == 3 else (orientation,)))
    entry = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    return head + struct.pack(order + "H", 1) + entry + bytes(4) + extra


def damaged() -> dict[str, bytes]:
    """Blocks that are broken, each in its own way; none of them says how to turn a picture."""
    sound = exif(1)
    loop = b"II" + struct.pack("<HIH", 42, 8, 0) + struct.pack("<I", 8)
    far = b"II" + struct.pack("<HI", 42, 0x7FFFFFFF)
    many = b"II" + struct.pack("<HIH", 42, 8, 65535) + bytes(40)
    offset = struct.pack("<HHII", 0x010F, 2, 1000, 0x7FFFFFF0)
    return {
        "empty": b"",
        "no-tiff": b"what is this? " * 4,
        "cut-header": sound[:6],
        "cut-entry": sound[:14],
        "loop": loop,
        "far": far,
        "many-entries": many,
        "far-value": b"II" + struct.pack("<HIH", 42, 8, 1) + offset + bytes(4),
        "zero-filled": b"II*\0\x08\0\0\0" + bytes(60),
        "orientation-0": exif(0),
        "orientation-9": exif(9),
        "orientation-text": b"II"
        + struct.pack("<HIH", 42, 8, 1)
        + struct.pack("<HHI", 0x0112, 2, 4)
        + b"six\0"
        + bytes(4),
        "two-orientations-of-one": b"II"
        + struct.pack("<HIH", 42, 8, 2)
        + 2 * struct.pack("<HHIHH", 0x0112, 3, 1, 1, 0)
        + bytes(4),
    }
