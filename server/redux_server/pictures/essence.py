"""What of a picture's file decides on its pixels, as a file, and what says how to see them.

All else of a caller's file is dropped before it is decoded, so that nothing that is thrown away
anyway can spoil a picture: texts, thumbnails, dates, further frames, wrong checksums of those.
Runs confined, in the process that decodes. Knows no pixels: those who decode judge them. All
formats are in one file: of each there is little, and all for the same.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

MAX_PROFILE_BYTES = 4 * 2**20
"""Larger ones count as none. Printers' profiles have up to some 3 MB."""
_MAX_PARTS = 100_000  # segments, chunks or blocks that are walked over
_ORIENTATION = 0x0112
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


class Numbers(NamedTuple):
    """What a file says on its colours without a profile, as PNG has it; None where it does not.

    ``cicp``: colour primaries and transfer function of ITU-T H.273. ``gamma``: the file's, times
    100,000. ``chromaticities``: x and y of white, red, green and blue, times 100,000.
    """

    cicp: tuple[int, int] | None = None
    gamma: int | None = None
    chromaticities: tuple[int, ...] | None = None


class Canvas(NamedTuple):
    """Where on a transparent sheet of ``width`` times ``height`` the pixels of the file lie."""

    width: int
    height: int
    left: int
    top: int


class Essence(NamedTuple):
    """A file without what does not decide on its pixels, and what was told beside them.

    ``orientation`` is EXIF's, 1 to 8, 0 where the decoder is to tell. ``transparent_16``: the one
    transparent colour of an RGB PNG with 16 bits a channel. ``is_grey``: also where the decoder
    makes RGB of it. ``is_inverted``: of 16 bits, and 0 is white.
    """

    data: bytes
    orientation: int = 1
    profile: bytes = b""
    numbers: Numbers = Numbers()
    canvas: Canvas | None = None
    transparent_16: tuple[int, ...] | None = None
    is_grey: bool = False
    is_inverted: bool = False


def essence(format_name: str, data: bytes) -> Essence:
    """The essence of ``data``, which is ``format_name``.

    Raises ``ValueError``, ``IndexError`` or ``struct.error`` if the file is damaged where it
    counts.
    """
    read = _READERS.get(format_name)
    return read(data) if read else Essence(data)


def orientation_of(exif: bytes) -> int:
    """The orientation in EXIF data, 1 if there is none that makes sense.

    Only this one entry is looked at; whatever else is broken is nobody's business here.
    """
    start = 6 if exif[:6] == b"Exif\0\0" else 0
    order = {b"II": "<", b"MM": ">"}.get(exif[start : start + 2])
    if order is None:
        return 1
    try:
        at = start + struct.unpack_from(order + "I", exif, start + 4)[0]
        (count,) = struct.unpack_from(order + "H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == _ORIENTATION:
                code = {1: "B", 3: "H", 4: "I"}.get(kind, "H")
                value = int(struct.unpack_from(order + code, exif, entry + 8)[0])
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


# --- PNG ------------------------------------------------------------------------------------------


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the body of each chunk, up to the end of the picture or the file.

    A last one that is cut off ends with the file.
    """
    at = len(_PNG_MAGIC)
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"IEND":
            return
        yield kind, at + 8, min(at + 8 + size, len(data))
        at += 12 + size


def _png(data: bytes) -> Essence:
    """Chunks of pixels are kept; ancillary ones count if they are sound, the first of each kind.

    As libpng has it (png_crc_finish, png_handle_unknown).
    """
    depth, kind = data[24:26]
    if data[12:16] != b"IHDR" or data[8:12] != b"\0\0\0\x0d":
        raise ValueError("IHDR has to be first")
    parts, told, has_rows = [data[:33]], dict[bytes, bytes](), False
    rows = []
    for name, start, end in png_chunks(data):
        if name == b"IDAT":
            has_rows = True
            rows.append((start, end))
        elif name == b"PLTE" and kind == 3 and name not in told:
            told[name] = b""
            parts.append(data[start - 8 : end + 4])  # of a wrong checksum the decoder tells
        elif (
            name in _PNG_TELLING
            and name not in told
            and (name == b"eXIf" or not has_rows)
            and data[end : end + 4] == zlib.crc32(data[start - 4 : end]).to_bytes(4, "big")
        ):
            told[name] = data[start:end]
    if kind == 3 and b"PLTE" not in told:
        raise ValueError("no palette")
    transparent, transparent_16 = _png_transparency(told.get(b"tRNS", b""), depth, kind)
    if transparent:
        parts.append(_png_chunk(b"tRNS", transparent))
    for start, end in rows:
        is_whole = len(data) >= end + 4
        parts.append(
            data[start - 8 : end + 4] if is_whole else _png_chunk(b"IDAT", data[start:end])
        )
    parts.append(_png_chunk(b"IEND", b""))
    numbers = _png_numbers(told)
    return Essence(
        b"".join(parts),
        orientation_of(told.get(b"eXIf", b"")),
        b"" if numbers.cicp else _png_profile(told.get(b"iCCP", b"")),
        numbers,
        transparent_16=transparent_16,
        is_grey=kind in (0, 4),
    )


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_transparency(body: bytes, depth: int, kind: int) -> tuple[bytes, tuple[int, ...] | None]:
    """The body of tRNS for Pillow, which spreads grey over 8 bits; a colour of 16 bits apart."""
    if kind == 3:
        return body[:256], None
    if kind == 0 and len(body) >= 2:
        value = int.from_bytes(body[:2], "big")
        if depth == 16:
            return body[:2], None
        most = (1 << depth) - 1
        return struct.pack(">H", (value & most) * 255 // most), None
    if kind == 2 and len(body) >= 6:
        values = struct.unpack(">HHH", body[:6])
        if depth == 16:
            return b"", values
        return struct.pack(">HHH", *(value & 0xFF for value in values)), None
    return b"", None


def _png_profile(body: bytes) -> bytes:
    name, _, packed = body.partition(b"\0")
    if not (0 < len(name) <= 79 and packed[:1] == b"\0"):
        return b""
    try:
        profile = zlib.decompressobj().decompress(packed[1:], MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return b""
    return profile if len(profile) <= MAX_PROFILE_BYTES else b""


def _png_numbers(told: dict[bytes, bytes]) -> Numbers:
    """In the order of PNG's third edition, 4.3, where a profile comes after cICP, before sRGB."""
    cicp = told.get(b"cICP", b"")
    if len(cicp) == 4 and cicp[2] == 0:
        return Numbers(cicp=(cicp[0], cicp[1]))
    if len(told.get(b"sRGB", b"")) == 1:
        return Numbers()
    gamma, points = told.get(b"gAMA", b""), told.get(b"cHRM", b"")
    return Numbers(
        gamma=int.from_bytes(gamma, "big") if len(gamma) == 4 else None,
        chromaticities=struct.unpack(">8I", points) if len(points) == 32 else None,
    )


_PNG_TELLING = frozenset({b"tRNS", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"eXIf"})


def png_rows_alone(data: bytes) -> bytes | None:
    """A PNG with all the rows of ``data``, an essence, and no checksum of them; None if some lack.

    For one that its decoder complains of: what is missing or wrong may be just that checksum.
    """
    body = b"".join(data[start:end] for name, start, end in png_chunks(data) if name == b"IDAT")
    passes = list(_png_passes(data))
    wanted, got = sum(lines * size for lines, size in passes), 0
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)  # of what lies between head and checksum
    packed = body[2:]
    try:
        while got < wanted:
            rows = unpacker.decompress(packed, 2**20) if packed else unpacker.flush()
            if not rows or not _png_filters_are_known(passes, got, rows):
                return None
            got += len(rows)
            packed = unpacker.unconsumed_tail
    except zlib.error:
        return None
    used = len(body) - len(packed) - len(unpacker.unused_data)
    at = next(start for name, start, _ in png_chunks(data) if name == b"IDAT") - 8
    return data[:at] + _png_chunk(b"IDAT", body[:used]) + _png_chunk(b"IEND", b"")


def _png_passes(data: bytes) -> Iterator[tuple[int, int]]:
    """How many rows each pass has, and how many bytes each of these, with its filter."""
    width, height, depth, kind, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * {2: 3, 4: 2, 6: 4}.get(kind, 1)
    for left, top, right, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, lines = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and lines > 0:
            yield lines, 1 + (columns * bits + 7) // 8


def _png_filters_are_known(passes: list[tuple[int, int]], at: int, rows: bytes) -> bool:
    """Whether the rows that begin in ``rows``, which are at ``at`` of all, have filters 0 to 4."""
    start = 0
    for lines, size in passes:
        end = start + lines * size
        first = max(0, start - at) if start >= at else -(at - start) % size
        if max(rows[first : max(0, end - at) : size], default=0) > 4:
            return False
        start = end
    return True


_ADAM7 = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)


# --- JPEG -----------------------------------------------------------------------------------------

_JPEG_TABLES = frozenset({0xC4, 0xCC, 0xDB, 0xDD})
_JPEG_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # no length follows
_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)


def _jpeg(data: bytes) -> Essence:
    """Tables and the frame up to the first scan; from there on all is the decoder's."""
    parts, exif, profile, families = [b"\xff\xd8"], b"", dict[int, bytes](), set[bytes]()
    count = 0
    for marker, start, end in _jpeg_segments(data):
        body = data[start + 2 : end]
        if marker == _JPEG_SCAN:
            parts.append(b"\xff\xda")
            parts.append(data[start:])
            break
        if marker in _JPEG_TABLES or marker in _JPEG_FRAMES:
            parts.append(bytes((0xFF, marker)) + data[start:end])
        elif marker == 0xE0 and body[:5] == b"JFIF\0" and b"JFIF" not in families:
            families.add(b"JFIF")
            parts.insert(1, _JFIF)
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            parts.append(b"\xff\xee\0\x0e" + body[:12])
        elif marker == 0xE1 and body[:6] == b"Exif\0\0" and not exif:
            exif = body
        elif marker == 0xE2 and body[:12] == b"ICC_PROFILE\0" and len(body) > 14:
            count = count or body[13]
            profile.setdefault(body[12], body[14:])
    else:
        raise ValueError("no scan")
    whole = b"".join(profile.get(each, b"") for each in range(1, count + 1))
    is_whole = set(range(1, count + 1)) <= profile.keys() and len(whole) <= MAX_PROFILE_BYTES
    return Essence(b"".join(parts), orientation_of(exif), whole if is_whole else b"")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, and start and end with the two bytes of the length, of each; bytes between skipped.

    Up to the first scan. The file may end within the last.
    """
    at = 2
    for _ in range(_MAX_PARTS):
        found = _MARKER.search(data, at)
        if found is None or data[found.end() - 1] == _JPEG_END:
            return
        marker, at = data[found.end() - 1], found.end()
        if marker in _JPEG_BARE:
            continue
        size = int.from_bytes(data[at : at + 2], "big")
        if size < 2:
            continue  # what follows is skipped up to the next marker
        yield marker, at, at + size
        at += size


def jpeg_scans_are_complete(data: bytes) -> bool:
    """Whether the scans of a JPEG's essence bring every coefficient of every component in full.

    The last scan may be cut off: only heads of scans are read.
    """
    planes: dict[int, list[int]] = {}
    is_progressive = False
    at = 2
    for _ in range(_MAX_PARTS):
        found = _SCAN_OR_SEGMENT.search(data, at)
        if found is None or data[found.end() - 1] == _JPEG_END:
            break
        marker, at = data[found.end() - 1], found.end()
        if marker in _JPEG_BARE:
            continue
        size = int.from_bytes(data[at : at + 2], "big")
        body = data[at + 2 : at + size]
        if marker in _JPEG_FRAMES:
            is_progressive = marker in (0xC2, 0xC6, 0xCA, 0xCE)
            planes = {body[6 + 3 * each]: [99] * 64 for each in range(body[5])}
        elif marker == _JPEG_SCAN:
            first, last, bits = body[-3:] if is_progressive else (0, 63, 0)
            for each in range(body[0]):
                done = planes.get(body[1 + 2 * each])
                if done is not None:
                    done[first : last + 1] = [bits & 15] * len(done[first : last + 1])
        at += size
    return bool(planes) and all(set(done) == {0} for done in planes.values())


_SCAN_OR_SEGMENT = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


# --- WebP, GIF ------------------------------------------------------------------------------------


def _riff_chunks(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    for _ in range(_MAX_PARTS):
        if at + 8 > end:
            return
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind in (b"VP8 ", b"VP8L") and at + 8 + size > end:
            raise ValueError("pixels are cut off")
        yield kind, data[at + 8 : min(at + 8 + size, end)]
        at += 8 + size + (size & 1)


def _webp(data: bytes) -> Essence:
    """RFC 9649: one still picture, the first frame of an animation."""
    told: dict[bytes, bytes] = {}
    for kind, body in _riff_chunks(data, 12, len(data)):
        told.setdefault(kind, body)
    head, canvas = told.get(b"VP8X", b"")[:10], None
    size = head[4:10]
    still = told
    if b"ANMF" in told and not {b"VP8 ", b"VP8L"} & told.keys():
        frame = told[b"ANMF"]
        size = frame[6:12]
        left, top = (2 * int.from_bytes(frame[at : at + 3], "little") for at in (0, 3))
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (4, 7))
        canvas = Canvas(width, height, left, top)
        still = {}
        for kind, body in _riff_chunks(frame, 16, len(frame)):
            still.setdefault(kind, body)
    name = next((name for name in (b"VP8L", b"VP8 ") if name in still), b"")
    if not name:
        raise ValueError("no pixels")
    chunks = b""
    if len(size) == 6:
        chunks = _riff_chunk(b"VP8X", bytes((head[0] & 0x10, 0, 0, 0)) + size)
        if name == b"VP8 " and b"ALPH" in still and head[0] & 0x10:
            chunks += _riff_chunk(b"ALPH", still[b"ALPH"])
    chunks += _riff_chunk(name, still[name])
    profile = told.get(b"ICCP", b"")
    return Essence(
        b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks,
        orientation_of(told.get(b"EXIF", b"")),
        profile if len(profile) <= MAX_PROFILE_BYTES else b"",
        canvas=canvas,
    )


def _riff_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) & 1)


def _gif(data: bytes) -> Essence:
    """The first frame alone, as if it were the screen. Frames beyond that make it larger."""
    width, height, packed = struct.unpack_from("<HHB", data, 6)
    at = 13 + _gif_palette(packed)
    palette, control = data[13:at], b""
    for _ in range(_MAX_PARTS):
        introducer = data[at]
        if introducer == 0x2C:
            break
        if introducer == 0x3B:
            raise ValueError("no frame")
        at += 1
        if introducer == 0x21:
            label, start = data[at], at + 1
            at = _gif_blocks_end(data, start)
            if label == 0xF9 and data[start] == 4:
                control = b"\x21\xf9" + data[start : start + 5] + b"\0"
    left, top, frame_width, frame_height, how = struct.unpack_from("<HHHHB", data, at + 1)
    start = at + 10 + _gif_palette(how)
    screen = struct.pack("<HH", frame_width, frame_height)
    head = data[:6], screen, data[10:13], palette, control, b",\0\0\0\0", screen
    rows = data[at + 9 : _gif_blocks_end(data, start + 1)]
    return Essence(
        b"".join((*head, rows, b"\0;")),
        canvas=Canvas(max(width, left + frame_width), max(height, top + frame_height), left, top),
    )


def _gif_palette(packed: int) -> int:
    return 3 * (2 << (packed & 7)) if packed & 0x80 else 0


def _gif_blocks_end(data: bytes, at: int) -> int:
    """Where a chain of blocks ends: behind the empty one, or with the file."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return min(at + 1, len(data))


# --- TIFF, AVIF, HEIC -----------------------------------------------------------------------------

# Tags of TIFF 6.0 and its supplements that say where the pixels lie and what they mean.
_TIFF_TAGS = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325}
    | {332, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}
)
_TIFF_REDUCED, _TIFF_ORIENTATION, _TIFF_PROFILE, _TIFF_RAW = 254, 274, 34675, 50706
_TIFF_PAGES, _TIFF_ENTRIES = 64, 1000


class _TiffKind(NamedTuple):
    """Byte order, and the formats of a count of entries, an entry and an offset."""

    order: str
    number: str
    entry: str
    offset: str


def tiff_pages(data: bytes) -> Iterator[dict[int, bytes]]:
    """The entries of each page by their tags, as they stand in the file."""
    kind, at = _tiff_kind(data)
    seen: set[int] = set()
    while at and at not in seen and len(seen) < _TIFF_PAGES:
        seen.add(at)
        (count,) = struct.unpack_from(kind.order + kind.number, data, at)
        size = struct.calcsize(kind.order + kind.entry)
        start = at + struct.calcsize(kind.order + kind.number)
        page: dict[int, bytes] = {}
        for entry in range(
            start, min(start + size * min(count, _TIFF_ENTRIES), len(data) - size + 1), size
        ):
            (tag,) = struct.unpack_from(kind.order + "H", data, entry)
            page.setdefault(tag, data[entry : entry + size])
        yield page
        end = start + size * count
        try:
            (at,) = struct.unpack_from(kind.order + kind.offset, data, end)
        except struct.error:
            return


def _tiff_kind(data: bytes) -> tuple[_TiffKind, int]:
    order = "<" if data[:2] == b"II" else ">"
    (version,) = struct.unpack_from(order + "H", data, 2)
    if version == 43:
        return _TiffKind(order, "Q", "HHQQ", "Q"), struct.unpack_from(order + "Q", data, 8)[0]
    return _TiffKind(order, "H", "HHII", "I"), struct.unpack_from(order + "I", data, 4)[0]


def tiff_number(data: bytes, entry: bytes) -> int:
    """The first value of an entry, 0 if it is no whole number."""
    kind, _ = _tiff_kind(data)
    (type_,) = struct.unpack_from(kind.order + "H", entry, 2)
    code = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(type_)
    value_at = 8 if kind.number == "H" else 12
    if code is None or len(entry) < value_at + struct.calcsize(kind.order + code):
        return 0
    return int(struct.unpack_from(kind.order + code, entry, value_at)[0])


def tiff_page(data: bytes) -> dict[int, bytes]:
    """The entries of the page that is meant: the first that is no smaller copy of another."""
    first: dict[int, bytes] | None = None
    for page in tiff_pages(data):
        first = first or page
        if not tiff_number(data, page.get(_TIFF_REDUCED, bytes(20))) & 1:
            return page
    if not first:
        raise ValueError("no page")
    return first


def _tiff(data: bytes) -> Essence:
    kind, _ = _tiff_kind(data)
    page = tiff_page(data)
    if _TIFF_RAW in page:
        raise ValueError("a raw photo, whose pages are smaller copies")
    for places, sizes in ((273, 279), (324, 325)):
        ends = zip(
            *(_tiff_numbers(data, page.get(tag), kind) for tag in (places, sizes)), strict=False
        )
        if any(at + size > len(data) for at, size in ends):
            raise ValueError("pixels are cut off")
    kept = [entry for tag, entry in sorted(page.items()) if tag in _TIFF_TAGS]
    start = len(data) + len(data) % 2
    listed = struct.pack(kind.order + kind.number, len(kept)) + b"".join(kept) + bytes(8)
    is_big = kind.number == "Q"
    head = data[:8] if is_big else data[:4]
    head += struct.pack(kind.order + kind.offset, start)
    orientation = tiff_number(data, page.get(_TIFF_ORIENTATION, bytes(20)))

    def first(tag: int) -> int | None:
        return next(iter(_tiff_numbers(data, page.get(tag), kind)), None)

    return Essence(
        b"".join((head, data[len(head) :], bytes(len(data) % 2), listed)),
        orientation if 1 <= orientation <= 8 else 1,
        _tiff_profile(data, page.get(_TIFF_PROFILE, b""), kind),
        is_inverted=(first(258), first(262)) == (16, 0),
    )


def _tiff_numbers(data: bytes, entry: bytes | None, kind: _TiffKind) -> tuple[int, ...]:
    """All values of an entry, none if they are no whole numbers or too many."""
    if not entry:
        return ()
    _, type_, count, at = struct.unpack(kind.order + kind.entry, entry)
    code = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(type_)
    if code is None or count > _MAX_PARTS:
        return ()
    form, room = f"{kind.order}{count}{code}", 4 if kind.number == "H" else 8
    if struct.calcsize(form) <= room:
        return struct.unpack_from(form, entry, len(entry) - room)
    return struct.unpack_from(form, data, at)


def _tiff_profile(data: bytes, entry: bytes, kind: _TiffKind) -> bytes:
    if not entry:
        return b""
    _, _, size, at = struct.unpack(kind.order + kind.entry, entry)
    return data[at : at + size] if 128 < size <= MAX_PROFILE_BYTES else b""


def _isobmff(data: bytes) -> Essence:
    """Items of metadata get a type that no decoder looks into; the rest has to stay where it is."""
    head = _METADATA_ITEM.sub(rb"\1skip", data[:_META_BYTES])
    found = _NCLX.search(head)
    cicp = struct.unpack(">HH", found[1]) if found else None
    return Essence(head + data[_META_BYTES:], 0, numbers=Numbers(cicp=cicp))


_META_BYTES = 2**20
_METADATA_ITEM = re.compile(rb"(infe(?:\x02...(?s:.{4})|\x03...(?s:.{6})))(?:Exif|mime)", re.DOTALL)
_NCLX = re.compile(rb"colrnclx(.{4})", re.DOTALL)
_READERS: dict[str, Callable[[bytes], Essence]] = {
    "AVIF": _isobmff,
    "GIF": _gif,
    "HEIC": _isobmff,
    "JPEG": _jpeg,
    "PNG": _png,
    "TIFF": _tiff,
    "WEBP": _webp,
}
