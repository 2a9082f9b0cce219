"""PNG files by hand, after the specification (third edition): all types, depths, filters, Adam7."""

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pictures.case import Array

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, INDEXED, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, INDEXED: 1, GREY_ALPHA: 2, RGBA: 4}
# Column and row of the first pixel, and the steps to the next (8.1).
_ADAM7 = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # fmt: skip


def chunk(kind: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    """A chunk; with a checksum of its own it is damaged."""
    found = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", found)


def header(width: int, height: int, bits: int, colour: int, interlaced: bool = False) -> bytes:
    """The chunk IHDR."""
    return chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    )


@dataclass(frozen=True)
class Style:
    """How a file is written: ``filters`` are used row by row, by turns."""

    interlaced: bool = False
    filters: Sequence[int] = (0,)
    level: int = 6
    split: int = 0  # bytes of each IDAT; 0: one for all


PLAIN = Style()


def png(
    samples: Array,
    bits: int,
    colour: int,
    style: Style = PLAIN,
    *,
    palette: Array | None = None,
    trns: bytes | None = None,
    before: bytes = b"",
    after: bytes = b"",
    end: bytes = chunk(b"IEND", b""),
) -> bytes:
    """A whole file. Chunks ``before`` follow the header, chunks ``after`` the rows."""
    height, width, _ = samples.shape
    parts = [SIGNATURE, header(width, height, bits, colour, style.interlaced), before]
    if palette is not None:
        parts.append(chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
    if trns is not None:  # between palette and rows
        parts.append(chunk(b"tRNS", trns))
    return b"".join([*parts, idat(rows(samples, bits, style), style), after, end])


def idat(raw: bytes, style: Style = PLAIN) -> bytes:
    """The rows, packed, in one chunk or in many."""
    packed = zlib.compress(raw, style.level)
    size = style.split or len(packed)
    return b"".join(chunk(b"IDAT", packed[at : at + size]) for at in range(0, len(packed), size))


def rows(samples: Array, bits: int, style: Style = PLAIN) -> bytes:
    """All rows, filtered, of all passes."""
    passes: Iterable[Array] = [samples]
    if style.interlaced:
        passes = [samples[y::dy, x::dx] for x, y, dx, dy in _ADAM7]
    return b"".join(_filtered(part, bits, style.filters) for part in passes if part.size)


def _filtered(samples: Array, bits: int, filters: Sequence[int]) -> bytes:
    channels = samples.shape[2]
    step = max(1, channels * bits // 8)
    out, above = bytearray(), np.zeros(0, np.int64)
    for number, row in enumerate(packed_rows(samples, bits)):
        current = row.astype(np.int64)
        if not number:
            above = np.zeros_like(current)
        kind = filters[number % len(filters)]
        left = np.concatenate([np.zeros(step, np.int64), current[:-step]])[: len(current)]
        corner = np.concatenate([np.zeros(step, np.int64), above[:-step]])[: len(current)]
        guess = (
            0 * current, left, above, (left + above) // 2, _paeth(left, above, corner),
        )[kind]  # fmt: skip
        out.append(kind)
        out += ((current - guess) & 255).astype(np.uint8).tobytes()
        above = current
    return bytes(out)


def _paeth(left: Array, above: Array, corner: Array) -> Array:
    guess = left + above - corner
    a, b, c = abs(guess - left), abs(guess - above), abs(guess - corner)
    return np.where((a <= b) & (a <= c), left, np.where(b <= c, above, corner))


def packed_rows(samples: Array, bits: int) -> Array:
    """(height, bytes of a row): big-endian, and the leftmost of small samples in the high bits."""
    height, width, channels = samples.shape
    flat = samples.reshape(height, width * channels)
    if bits == 16:
        return np.stack([flat >> 8, flat & 255], -1).reshape(height, -1).astype(np.uint8)
    if bits == 8:
        return flat.astype(np.uint8)
    each = 8 // bits
    padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % each))).reshape(height, -1, each)
    shifts = 8 - bits * (1 + np.arange(each))
    return (padded << shifts).sum(-1).astype(np.uint8)
