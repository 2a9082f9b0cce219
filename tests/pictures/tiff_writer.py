"""TIFF by hand (TIFF 6.0, and the BigTIFF design of 2004): any order, layout and depth."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pictures.case import Array
from pictures.png_writer import packed_rows

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, CIELAB = 0, 1, 2, 3, 5, 8
_CODES = {1: "B", 3: "H", 4: "I", 7: "B", 16: "Q"}


@dataclass(frozen=True)
class Layout:
    """How samples lie in a file. ``tile`` has a side, 0 for strips of ``strip`` rows."""

    order: str = "<"
    big: bool = False
    compression: int = 1
    predictor: int = 1
    planar: bool = False
    strip: int = 7
    tile: int = 0
    fill_order: int = 1
    tags: dict[int, tuple[int, list[int]]] = field(default_factory=dict)


def tiff(
    samples: Array,
    bits: int,
    photometric: int,
    layout: Layout,
    *,
    sample_format: int = 1,
    extra: tuple[int, ...] = (),
) -> bytes:
    """One page of (h, w, channels) samples."""
    height, width, channels = samples.shape
    planes = [samples[..., n : n + 1] for n in range(channels)] if layout.planar else [samples]
    blocks = [_compressed(part, bits, layout) for plane in planes for part in _parts(plane, layout)]
    tags: dict[int, tuple[int, list[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * channels),
        259: (3, [layout.compression]),
        262: (3, [photometric]),
        266: (3, [layout.fill_order]),
        277: (3, [channels]),
        284: (3, [2 if layout.planar else 1]),
        339: (3, [sample_format] * channels),
        **layout.tags,
    }
    if layout.predictor != 1:
        tags[317] = (3, [layout.predictor])
    if extra:
        tags[338] = (3, list(extra))
    offsets, counts = (324, 325) if layout.tile else (273, 279)
    if layout.tile:
        tags |= {322: (4, [layout.tile]), 323: (4, [layout.tile])}
    else:
        tags[278] = (4, [layout.strip])
    return pages([(tags, blocks, offsets, counts)], layout)


def pages(
    found: list[tuple[dict[int, tuple[int, list[int]]], list[bytes], int, int]], layout: Layout
) -> bytes:
    """A whole file of pages: tags, blocks of pixels, and the tags that point to these."""
    order, pointer = layout.order, "Q" if layout.big else "I"
    mark = b"II" if order == "<" else b"MM"
    head = mark + (
        struct.pack(order + "HHHQ", 43, 8, 0, 16)
        if layout.big
        else struct.pack(order + "HI", 42, 8)
    )
    out = head
    for number, (tags, blocks, offsets, counts) in enumerate(found):
        kind = 16 if layout.big else 4
        tags = {**tags, offsets: (kind, [0] * len(blocks)), counts: (4, [len(b) for b in blocks])}
        size = len(_directory(tags, layout, len(out), 0))
        at = len(out) + size
        places = []
        for block in blocks:
            places.append(at)
            at += len(block) + len(block) % 2
        tags[offsets] = (kind, places)
        following = at if number + 1 < len(found) else 0
        out += _directory(tags, layout, len(out), following)
        out += b"".join(block + bytes(len(block) % 2) for block in blocks)
    assert struct.calcsize(pointer) in (4, 8)
    return out


def _directory(
    tags: dict[int, tuple[int, list[int]]], layout: Layout, at: int, following: int
) -> bytes:
    order = layout.order
    count, pointer, inline = ("Q", "Q", 8) if layout.big else ("H", "I", 4)
    entry_size = 4 + 2 * struct.calcsize(order + pointer)
    values_at = at + struct.calcsize(order + count) + entry_size * len(tags)
    values_at += struct.calcsize(order + pointer)
    entries, values = b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}{_CODES[kind]}", *numbers)
        if len(packed) > inline:
            place = struct.pack(order + pointer, values_at + len(values))
            values += packed + bytes(len(packed) % 2)
        else:
            place = packed.ljust(inline, b"\0")
        entries += struct.pack(order + "HH" + pointer, tag, kind, len(numbers)) + place
    head = struct.pack(order + count, len(tags))
    return head + entries + struct.pack(order + pointer, following) + values


def _parts(plane: Array, layout: Layout) -> list[Array]:
    height, width, _ = plane.shape
    if not layout.tile:
        return [plane[top : top + layout.strip] for top in range(0, height, layout.strip)]
    side = layout.tile
    padded = np.pad(plane, ((0, -height % side), (0, -width % side), (0, 0)), mode="edge")
    return [
        padded[top : top + side, left : left + side]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def _compressed(part: Array, bits: int, layout: Layout) -> bytes:
    if layout.predictor == 2:
        part = part.copy()
        part[:, 1:] = (part[:, 1:] - part[:, :-1]) & (2**bits - 1)
    raw = _raw(part, bits, layout)
    if layout.fill_order == 2:
        raw = bytes(int(f"{each:08b}"[::-1], 2) for each in raw)
    return _PACKERS[layout.compression](raw, part.shape[0])


def _raw(part: Array, bits: int, layout: Layout) -> bytes:
    if part.dtype.kind == "f":
        return part.astype(f"{layout.order}f{bits // 8}").tobytes()
    if bits in (16, 32):
        return part.astype(f"{layout.order}u{bits // 8}").tobytes()
    return packed_rows(part, bits).tobytes()


def _packbits(raw: bytes, rows: int) -> bytes:
    out, size = b"", len(raw) // rows
    for top in range(0, len(raw), size):  # no run goes from row to row
        row = raw[top : top + size]
        at = 0
        while at < len(row):
            end = at
            while end < len(row) and end - at < 128 and row[end] == row[at]:
                end += 1
            if end - at > 1:
                out += bytes([257 - (end - at), row[at]])
            else:
                end = min(at + 20, len(row))
                out += bytes([end - at - 1]) + row[at:end]
            at = end
    return out


def _lzw(raw: bytes, _rows: int) -> bytes:
    """TIFF 6.0, section 13: high bits first, and codes grow one entry early."""
    out, held, size, known, after = 0, 0, 9, {bytes([n]): n for n in range(256)}, 258
    prefix = b""

    def put(code: int) -> None:
        nonlocal out, held
        out, held = out << size | code, held + size

    put(256)
    for value in raw:
        longer = prefix + bytes([value])
        if longer in known:
            prefix = longer
            continue
        put(known[prefix])
        known[longer], after = after, after + 1
        prefix = bytes([value])
        if after == 4095:
            put(256)
            size, known, after = 9, {bytes([n]): n for n in range(256)}, 258
        elif after + 1 > 1 << size:
            size += 1
    put(known[prefix])
    after += 1
    if after + 1 > 1 << size and size < 12:
        size += 1
    put(257)
    return (out << (-held % 8)).to_bytes((held + 7) // 8, "big")


_PACKERS: dict[int, Callable[[bytes, int], bytes]] = {
    1: lambda raw, _: raw,
    5: _lzw,
    8: lambda raw, _: zlib.compress(raw),
    32773: _packbits,
    32946: lambda raw, _: zlib.compress(raw),
}
