"""Decode in this process, without the child, and put PNGs together by hand."""

import struct
import sys
import zlib

import numpy as np

from redux_server.pictures import colours
from redux_server.pictures.pixels import srgb_strips
from server.hostile_images import chunk

assert colours.__name__ in sys.modules  # the child imports it if a file may need it
REFUSED = (OSError, SyntaxError, ValueError, IndexError, struct.error, zlib.error)


def decoded(format_name, data, min_side=1):
    """The picture, as an array ``(H, W, 3)``."""
    (width, height), *strips = srgb_strips(format_name, data, lambda *size: None, min_side)
    rows = b"".join(strip.tobytes() for strip in strips)
    return np.frombuffer(rows, np.uint8).reshape(height, width, 3)


def chunks_of(png):
    at, found = 8, []
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def png_of(*parts):
    """Parts are chunks, as kind and body, or bytes as they are."""
    packed = (part if isinstance(part, bytes) else chunk(*part) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
