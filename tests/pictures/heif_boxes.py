"""Containers of HEIC and AVIF by hand (ISO/IEC 14496-12, 23008-12): grids, turns, alpha, profiles.

Pixels come coded from an encoder's file; the boxes around them are written anew, as phones do.
"""

import struct
from dataclasses import dataclass, field


def box(kind: bytes, *parts: bytes) -> bytes:
    """A box of these parts."""
    body = b"".join(parts)
    return struct.pack(">I", len(body) + 8) + kind + body


def full(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    """A box with version and flags."""
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def boxes(data: bytes, start: int = 0) -> list[tuple[bytes, bytes]]:
    """Kind and body of each box that follows the other from ``start``."""
    found, at = [], start
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big") or len(data) - at
        found.append((data[at + 4 : at + 8], data[at + 8 : at + size]))
        at += size
    return found


@dataclass(frozen=True)
class Item:
    """A picture or a block of metadata; properties are whole boxes, ``to`` numbers other items."""

    kind: bytes
    data: bytes
    properties: tuple[bytes, ...] = ()
    refers: bytes = b""
    to: tuple[int, ...] = field(default=())


def coded(data: bytes) -> tuple[bytes, bytes]:
    """The decoder's configuration (a whole box) and the coded bytes of an encoder's one picture."""
    meta = dict(boxes(dict(boxes(data))[b"meta"], 4))
    primary = int.from_bytes(meta[b"pitm"][4:6], "big")
    properties = boxes(dict(boxes(meta[b"iprp"]))[b"ipco"])
    config = next(box(kind, body) for kind, body in properties if kind in (b"hvcC", b"av1C"))
    offset, size = _places(meta[b"iloc"])[primary]
    return config, data[offset : offset + size]


def _places(iloc: bytes) -> dict[int, tuple[int, int]]:
    version, sizes, more = iloc[0], iloc[4], iloc[5]
    offset_size, length_size, base_size = sizes >> 4, sizes & 15, more >> 4
    count, at = int.from_bytes(iloc[6:8], "big"), 8
    found = {}

    def number(size: int) -> int:
        nonlocal at
        at += size
        return int.from_bytes(iloc[at - size : at], "big")

    for _ in range(count):
        item = number(2)
        if version:
            number(2)
        number(2)
        base = number(base_size)
        extents = [(number(offset_size), number(length_size)) for _ in range(number(2))]
        found[item] = (base + extents[0][0], extents[0][1])
    return found


def container(items: list[Item], primary: int = 1, brand: bytes = b"heic") -> bytes:
    """A file of items, numbered from 1."""
    ftyp = box(b"ftyp", brand, bytes(4), b"mif1", brand, b"miaf")
    shared = list(dict.fromkeys(each for item in items for each in item.properties))
    ipma = full(b"ipma", 0, 0, struct.pack(">I", len(items)), *(
        struct.pack(">HB", number, len(item.properties))
        + bytes(0x80 | shared.index(each) + 1 if _is_essential(each) else shared.index(each) + 1
                for each in item.properties)
        for number, item in enumerate(items, 1)
    ))  # fmt: skip
    infe = [
        full(b"infe", 2, int(item.kind == b"Exif"), struct.pack(">HH", number, 0), item.kind, b"\0")
        for number, item in enumerate(items, 1)
    ]
    refs = [
        box(item.refers, struct.pack(">HH", number, len(item.to)),
            b"".join(struct.pack(">H", each) for each in item.to))
        for number, item in enumerate(items, 1) if item.to
    ]  # fmt: skip

    def meta(start: int) -> bytes:
        entries, at = b"", start
        for number, item in enumerate(items, 1):
            entries += struct.pack(">HHHII", number, 0, 1, at, len(item.data))
            at += len(item.data)
        return full(
            b"meta", 0, 0,
            full(b"hdlr", 0, 0, bytes(4), b"pict", bytes(13)),
            full(b"pitm", 0, 0, struct.pack(">H", primary)),
            full(b"iloc", 0, 0, b"\x44\0", struct.pack(">H", len(items)), entries),
            full(b"iinf", 0, 0, struct.pack(">H", len(items)), *infe),
            *([full(b"iref", 0, 0, *refs)] if refs else []),
            box(b"iprp", box(b"ipco", *shared), ipma),
        )  # fmt: skip

    start = len(ftyp) + len(meta(0)) + 8
    return ftyp + meta(start) + box(b"mdat", *(item.data for item in items))


def _is_essential(whole: bytes) -> bool:
    return whole[4:8] in (b"hvcC", b"av1C", b"irot", b"imir", b"clap")


def ispe(width: int, height: int) -> bytes:
    """The size of a picture before it is turned."""
    return full(b"ispe", 0, 0, struct.pack(">II", width, height))


def pixi(channels: int = 3, bits: int = 8) -> bytes:
    """Bits of each channel."""
    return full(b"pixi", 0, 0, bytes([channels] + [bits] * channels))


def nclx(primaries: int, transfer: int, matrix: int, *, is_full: bool = True) -> bytes:
    """Colours in numbers of H.273."""
    numbers = struct.pack(">HHHB", primaries, transfer, matrix, 0x80 if is_full else 0)
    return box(b"colr", b"nclx", numbers)


def prof(icc: bytes) -> bytes:
    """Colours by a profile."""
    return box(b"colr", b"prof", icc)


def irot(quarters: int) -> bytes:
    """A turn by so many quarters, against the clock."""
    return box(b"irot", bytes([quarters]))


def imir(axis: int) -> bytes:
    """0: top and bottom change places; 1: left and right (ISO/IEC 23008-12:2022, 6.5.12)."""
    return box(b"imir", bytes([axis]))


def grid(columns: int, rows: int, width: int, height: int) -> bytes:
    """The data of an item ``grid``."""
    return struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)


ALPHA = full(b"auxC", 0, 0, b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0")
