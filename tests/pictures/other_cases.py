"""What is no picture, or none that is taken: the right refusal; and files that ask for much."""

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain

import numpy as np

from pictures import scenes
from pictures.bmp_cases import Head, bmp
from pictures.case import Case, Made, refusal
from pictures.gif_cases import Frame, gif
from pictures.png_writer import RGB, SIGNATURE, chunk, header, png
from pictures.tiff_writer import RGB as TIFF_RGB
from pictures.tiff_writer import Layout, tiff
from pictures.tools import as_png, run

TOO_MUCH = ("pixels", "broken", "memory", "slow")


def cases() -> Iterator[Case]:
    """All cases of no format."""
    return chain(_others(), _unsupported(), _bombs(), _large())


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", png(scenes.noise(3, 8), 8, RGB))
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    return buffer.getvalue()


def _others() -> Iterator[Case]:
    yield refusal("other/empty", b"", "empty")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"/>'
    files = {
        "one-byte": b"\x89",
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n",
        "svg": svg,
        "svg-with-declaration": b'<?xml version="1.0"?>\n' + svg,
        "svg-packed": b"\x1f\x8b\x08\0" + zlib.compress(svg),
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "xml": b'<?xml version="1.0"?><a/>',
        "json": b'{"image": "https://example.com/a.png"}',
        "text": b"Not found. Please try again later.\n" * 3,
        "text-utf-16": "Not found".encode("utf-16"),
        "base64": b"iVBORw0KGgoAAAANSUhEUgAAABQAAAAUCAIAAAAC64pa",
        "data-uri": b"data:image/png;base64,iVBORw0KGgoAAAANSUhEUg==",
        "mp4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(99),
        "mov": b"\0\0\0\x14ftypqt  \0\0\0\0qt  " + bytes(99),
        "webm": b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\x1fB\x86\x81\x01" + bytes(99),
        "avi": b"RIFF\x24\0\0\0AVI LIST" + bytes(99),
        "wav": b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0" + bytes(99),
        "mp3": b"ID3\4\0\0\0\0\0\x0fTIT2" + bytes(99),
        "ogg": b"OggS\0\2" + bytes(99),
        "psd": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x20\0\0\0\x20\0\x08\0\3" + bytes(99),
        "ico": b"\0\0\1\0\1\0\x20\x20\0\0\1\0\x20\0" + bytes(99),
        "cur": b"\0\0\2\0\1\0\x20\x20\0\0\1\0\x20\0" + bytes(99),
        "icns": b"icns\0\0\0\x08",
        "jp2": b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 " + bytes(99),
        "j2k": b"\xff\x4f\xff\x51\0\x2f" + bytes(99),
        "jpeg-xr": b"II\xbc\x01\x08\0\0\0" + bytes(99),
        "jpeg-ls-mark": b"\xff\xd7\xff" + bytes(99),
        "exr": b"\x76\x2f\x31\x01\2\0\0\0" + bytes(99),
        "hdr": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 20 +X 20\n" + bytes(99),
        "ppm": b"P6 20 20 255\n" + bytes(1200),
        "pgm-text": b"P2 2 2 255\n1 2 3 4\n",
        "pam": b"P7\nWIDTH 20\nHEIGHT 20\nDEPTH 3\nMAXVAL 255\nENDHDR\n" + bytes(1200),
        "tga": bytes([0, 0, 2]) + bytes(9) + struct.pack("<HHBB", 20, 20, 24, 0) + bytes(1200),
        "pcx": b"\x0a\5\1\x08" + bytes(200),
        "dds": b"DDS \x7c\0\0\0" + bytes(200),
        "qoi": b"qoif" + struct.pack(">IIBB", 20, 20, 3, 0) + bytes(20),
        "farbfeld": b"farbfeld" + struct.pack(">II", 20, 20) + bytes(3200),
        "xbm": b"#define a_width 20\n#define a_height 20\nstatic char a_bits[] = {0};\n",
        "xpm": b"/* XPM */\nstatic char *a[] = {\n",
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(99),
        "emf": b"\1\0\0\0\x6c\0\0\0" + bytes(32) + b" EMF" + bytes(60),
        "zip": _archive(),
        "tar": _tar(),
        "gzip": b"\x1f\x8b\x08" + bytes(30),
        "rar": b"Rar!\x1a\7\1\0" + bytes(30),
        "7z": b"7z\xbc\xaf\x27\x1c" + bytes(30),
        "elf": b"\x7fELF\2\1\1" + bytes(60),
        "exe": b"MZ\x90\0" + bytes(60),
        "python": b"#!/usr/bin/env python3\nprint('hello')\n",
        "font": b"wOF2\0\1\0\0" + bytes(60),
        "sqlite": b"SQLite format 3\0" + bytes(99),
        "cr3": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(99),
        "flif": b"FLIF33" + bytes(30),
        "bpg": b"BPG\xfb" + bytes(30),
        "zeros": bytes(4096),
        "noise": np.random.default_rng(5).bytes(4096),
        "png-behind-a-line": b"\n" + png(scenes.noise(3, 8), 8, RGB),
        "png-as-text-mode": png(scenes.noise(3, 8), 8, RGB).replace(b"\r\n", b"\n"),
        "bmp-mark-in-a-text": b"BMW is a maker of cars and of motorcycles.",
        "mng": b"\x8aMNG\r\n\x1a\n" + bytes(60),
        "jng": b"\x8bJNG\r\n\x1a\n" + bytes(60),
    }
    for name, data in files.items():
        yield refusal(f"other/{name}", data, "format")


def _unsupported() -> Iterator[Case]:
    """Formats that may be taken, if they are then shown right."""
    for flags in (("-d", "0"), ("-d", "1"), ("-d", "0", "--container=1")):
        picture = scenes.smooth()
        yield Case(
            f"jxl/cjxl/{''.join(flags)}",
            lambda f=flags, p=picture: Made(
                run("cjxl", "i.png", "o.jxl", *f, out="o.jxl", i_png=as_png(p)), p
            ),
            may_refuse=("format",),
        )
    raw = {50706: (7, [1, 4, 0, 0]), 259: (3, [1])}
    dng = tiff(scenes.noise(3, 8), 8, 32803, Layout(tags=raw))
    yield refusal("other/dng", dng, "broken", "format")
    cr2 = tiff(scenes.noise(3, 8), 8, TIFF_RGB, Layout())
    yield refusal("other/cr2-header-alone", cr2[:8] + b"CR\2\0" + bytes(40), "broken", "format")


@cache
def _zeros() -> bytes:
    """300 MiB, packed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush()


def _bombs() -> Iterator[Case]:
    end = chunk(b"IEND", b"")

    def claims(width: int, height: int, bits: int = 8, colour: int = RGB) -> bytes:
        return SIGNATURE + header(width, height, bits, colour) + chunk(b"IDAT", _zeros()) + end

    samples = scenes.noise(3, 8)
    page = tiff(samples, 8, TIFF_RGB, Layout())

    def tiff_of(width: int, height: int, compression: int = 8) -> bytes:
        tags = {256: (4, [width]), 257: (4, [height]), 278: (4, [height])}
        return tiff(samples, 8, TIFF_RGB, Layout(compression=compression, tags=tags))

    frame = Frame(np.zeros((16, 16), np.int64))
    bombs: dict[str, Callable[[], bytes]] = {
        "png-2^31": lambda: claims(2**31 - 1, 2**31 - 1),
        "png-row-of-2^31": lambda: claims(2**31 - 1, 1),
        "png-60000": lambda: claims(60_000, 60_000),
        "png-16-bit-30000": lambda: claims(30_000, 30_000, 16, 6),
        "gif-65535": lambda: gif((65535, 65535), [frame], scenes.palette(4)),
        "bmp-2^31": lambda: bmp(Head(), (2**31 - 1, 2**31 - 1), bytes(99)),
        "bmp-rle-60000": lambda: bmp(
            Head(bits=8, compression=1), (60_000, 60_000), b"\0\1", scenes.palette(256)
        ),
        "tiff-2^31": lambda: tiff_of(2**31 - 1, 2**31 - 1),
        "tiff-60000": lambda: tiff_of(60_000, 60_000),
        "tiff-lzw-60000": lambda: tiff_of(60_000, 60_000, 5),
        "tiff-ifd-loop": lambda: page[:4] + struct.pack("<IHI", 8, 0, 8),
        "webp-16384": lambda: b"RIFF\x16\0\0\0WEBPVP8X\x0a" + bytes(7) + b"\xff\x3f\0\xff\x3f\0",
        "jpeg-65500": lambda: b"\xff\xd8\xff\xc0\0\x11\x08" + struct.pack(">HH", 65500, 65500)
        + b"\x03\x01\x22\0\x02\x11\x01\x03\x11\x01\xff\xda\0\x0c\x03\x01\0\x02\x11\x03\x11\0\x3f\0",
    }  # fmt: skip
    for name, data in bombs.items():
        yield refusal(f"bomb/{name}", data, *TOO_MUCH)
    yield Case(  # what is behind the rows is thrown away
        "bomb/png-300-MB-behind-the-rows-of-text",
        lambda: Made(
            png(samples, 8, RGB, after=chunk(b"zTXt", b"k\0\0" + _zeros())), scenes.rgb(samples)
        ),
    )


def _large() -> Iterator[Case]:
    """90 megapixels of squares: taken by default, perhaps smaller."""
    squares = scenes.palette(6 * 9).reshape(6, 9, 3)

    def large() -> Made:
        rows = [np.repeat(row, 1290, 0).astype(np.uint8).tobytes() for row in squares]
        packer = zlib.compressobj(1)
        parts = [packer.compress(b"\0" + row) for row in rows for _ in range(1290)]
        packed = b"".join(parts) + packer.flush()
        data = SIGNATURE + header(9 * 1290, 6 * 1290, 8, RGB) + chunk(b"IDAT", packed)
        return Made(data + chunk(b"IEND", b""), squares, reduced=True)

    yield Case("large/png-90-megapixels", large)
