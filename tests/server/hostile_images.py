"""Pictures made to break a decoder: bombs, and sound files that were damaged in many ways.

All are made from a seed, so that what was found once is found again. Nothing here decodes.
"""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pillow_heif
from PIL import Image

from redux_server.pictures.decode import accepted_formats

_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    """The file of ``image``."""
    buffer = io.BytesIO()
    if format_name == "HEIC":
        pillow_heif.from_pillow(image.convert("RGB")).save(buffer, **options)
    else:
        image.save(buffer, format_name, **options)
    return buffer.getvalue()


def gradient(width: int = 64, height: int = 48) -> Image.Image:
    """A small colourful picture."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk with a right checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def originals() -> list[bytes]:
    """Sound files of every accepted format, with the features that have much code behind them."""
    picture = gradient()
    frames = [picture, picture.transpose(Image.Transpose.ROTATE_180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(picture, name) for name in accepted_formats()]
    files += [
        encoded(picture.convert("P"), "PNG", transparency=0),
        encoded(picture.convert("RGBA"), "PNG", exif=exif, dpi=(72, 72)),
        encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        encoded(picture.convert("CMYK"), "JPEG", progressive=True),
        encoded(picture, "JPEG", exif=exif, comment=b"c" * 99, restart_marker_rows=1),
        encoded(picture.convert("RGBA"), "WEBP", lossless=True, exif=exif),
        encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0),
        encoded(picture.convert("1"), "BMP"),
        encoded(picture.convert("P"), "BMP"),
    ]
    return files


def mutated(count: int, seed: int) -> Iterator[bytes]:
    """``count`` damaged files; the first bytes often stay, so that they are looked into."""
    rng = random.Random(seed)
    sound = originals()
    ways: tuple[Callable[[random.Random, bytearray, list[bytes]], None], ...] = (
        _flip_bits, _set_bytes, _set_numbers, _cut, _repeat, _drop, _splice, _swap,
    )  # fmt: skip
    for index in range(count):
        original = sound[index % len(sound)]
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 2, 5))):
            if len(data) > 40:
                rng.choice(ways)(rng, data, sound)
        if rng.random() < 0.8:
            data[:12] = original[:12]
        if data.startswith(b"\x89PNG") and rng.random() < 0.7:
            _repair_checksums(data)
        yield bytes(data)


def _flip_bits(rng: random.Random, data: bytearray, _sound: list[bytes]) -> None:
    for _ in range(rng.choice((1, 3, 30))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set_bytes(rng: random.Random, data: bytearray, _sound: list[bytes]) -> None:
    at, size = rng.randrange(len(data)), rng.choice((1, 4, 40))
    data[at : at + size] = rng.randbytes(size)


def _set_numbers(rng: random.Random, data: bytearray, _sound: list[bytes]) -> None:
    """Where lengths, sides and offsets stand: mostly near the front."""
    code = rng.choice(("<I", ">I", "<H", ">H", "B"))
    size = struct.calcsize(code)
    at = rng.randrange(min(len(data), rng.choice((64, 1 << 20))) - size)
    struct.pack_into(code, data, at, rng.choice(_INTERESTING) & ((1 << (8 * size)) - 1))


def _cut(rng: random.Random, data: bytearray, _sound: list[bytes]) -> None:
    del data[rng.randrange(12, len(data)) :]


def _repeat(rng: random.Random, data: bytearray, _sound: list[bytes]) -> None:
    at, size = rng.randrange(len(data)), rng.choice((4, 30, 200))
    data[at:at] = bytes(data[at : at + size]) * rng.choice((1, 2, 50))


def _drop(rng: random.Random, data: bytearray, _sound: list[bytes]) -> None:
    at = rng.randrange(12, len(data))
    del data[at : at + rng.choice((1, 4, 60))]


def _splice(rng: random.Random, data: bytearray, sound: list[bytes]) -> None:
    other = rng.choice(sound)
    data[rng.randrange(12, len(data)) :] = other[rng.randrange(len(other)) :]


def _swap(rng: random.Random, data: bytearray, _sound: list[bytes]) -> None:
    a, b, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice((4, 16))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def _repair_checksums(data: bytearray) -> None:
    """Make every chunk's checksum right again, so that the damage gets past it."""
    at = 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + size
        if end + 4 > len(data):
            return
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4


def bombs() -> dict[str, bytes]:
    """Small files that ask for much memory or time."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(200)) + packer.flush()
    rows = zlib.compress(b"".join(b"\0" + bytes(60) for _ in range(20)))
    text, nothing = chunk(b"tEXt", b"k\0" + b"v" * 50), chunk(b"IDAT", b"")
    return {
        "200 MB behind the rows": png(20, 20, packed),
        "200 MB of zeros as rows": png(6300, 6300, packed),
        "200 MB of text": png(20, 20, rows, chunk(b"zTXt", b"k\0\0" + packed)),
        "200 MB of profile": png(20, 20, rows, chunk(b"iCCP", b"k\0\0" + packed)),
        "2^31 on a side": png(2**31 - 1, 2**31 - 1, rows),
        "one row of 2^31": png(2**31 - 1, 1, rows),
        "40 MP of 16 bits": png(6324, 6324, packed, depth=16, kind=6),
        "100 MP of 16 bits": png(10_000, 10_000, packed, depth=16, kind=6),
        "ten thousand text chunks": png(20, 20, rows, text * 10_000),
        "ten thousand empty chunks of rows": png(20, 20, rows, nothing * 10_000),
        "2,000 GIF frames": _gif(6000, frames=2000),
        "GIF of 65535": _gif(65535, frames=1),
        "BMP of 2^31": _bmp(2**31 - 1, 2**31 - 1),
        "BMP of height -2^31": _bmp(9, -(2**31)),
        "WEBP of 16383": b"RIFF\x16\0\0\0WEBPVP8X\x0a" + bytes(7) + b"\xfe\x3f\0\xfe\x3f\0",
        "JPEG of 65500": _jpeg(65500, 65500),
        "JPEG of 6000 without data": _jpeg(6000, 6000),
        "JPEG of ten thousand comments": (
            b"\xff\xd8" + b"\xff\xfe\0\x04ab" * 10_000 + encoded(gradient(), "JPEG")[2:]
        ),
    }


def png(
    width: int, height: int, rows: bytes, extra: bytes = b"", *, depth: int = 8, kind: int = 2
) -> bytes:
    """A PNG with these packed ``rows``, whatever its header says."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    ends = chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + ends


def _gif(side: int, *, frames: int) -> bytes:
    frame = b",\0\0\0\0" + struct.pack("<HHB", side, side, 0) + b"\2\2D\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + frame * frames + b";"


def _bmp(width: int, height: int) -> bytes:
    head = (99, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", *head)


def _jpeg(width: int, height: int) -> bytes:
    """A header, and no entropy-coded data."""
    sides = struct.pack(">HH", height, width)
    frame = b"\xff\xc0\0\x11\x08" + sides + b"\x03\x01\x22\0\x02\x11\x01\x03\x11\x01"
    return b"\xff\xd8" + frame + b"\xff\xda\0\x0c\x03\x01\0\x02\x11\x03\x11\0\x3f\0"
