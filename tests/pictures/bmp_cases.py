"""BMP by hand: all headers, depths, masks and run lengths ([MS-WMF] 2.2.2, and OS/2's)."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from pictures import scenes
from pictures.case import EXACT, ROUNDED, Array, Case, Made, Within, refusal
from pictures.png_writer import packed_rows

RGB, RLE8, RLE4, BITFIELDS = 0, 1, 2, 3
MASKS = {
    "555": (16, 0x7C00, 0x03E0, 0x001F),
    "565": (16, 0xF800, 0x07E0, 0x001F),
    "444": (16, 0x0F00, 0x00F0, 0x000F),
    "888": (32, 0xFF0000, 0xFF00, 0xFF),
    "888-reversed": (32, 0xFF, 0xFF00, 0xFF0000),
    "888-high": (32, 0xFF000000, 0xFF0000, 0xFF00),
    "101010": (32, 0x3FF00000, 0xFFC00, 0x3FF),
}


@dataclass(frozen=True)
class Head:
    """A header of ``size`` bytes; heights below 0 mean that the first row is the top one."""

    size: int = 40
    bits: int = 24
    compression: int = RGB
    used: int = 0
    masks: tuple[int, ...] = ()
    top_down: bool = False


def bmp(head: Head, size: tuple[int, int], body: bytes, palette: Array | None = None) -> bytes:
    """A whole file; ``body`` has the rows as they are stored."""
    width, height = size
    signed = -height if head.top_down else height
    if head.size == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, head.bits)
    else:
        info = struct.pack(
            "<IiiHHIIiiII", head.size, width, signed, 1, head.bits, head.compression, len(body),
            2835, 2835, head.used, 0,
        )  # fmt: skip
        if head.size >= 52 and head.size != 64:
            info += struct.pack(f"<{len(head.masks)}I", *head.masks)
            if head.size >= 108:
                info = info.ljust(56, b"\0") + b"BGRs"  # sRGB
        info = info[: head.size].ljust(head.size, b"\0")
        if head.size == 40 and head.compression == BITFIELDS:
            info += struct.pack("<3I", *head.masks[:3])
    colours = b""
    if palette is not None:
        blank = b"" if head.size == 12 else b"\0"
        colours = b"".join(bytes([b, g, r]) + blank for r, g, b in palette.tolist())
    start = 14 + len(info) + len(colours)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + colours + body


def stored(rows: Array, *, top_down: bool = False) -> bytes:
    """Rows of bytes, each to a multiple of four, from the bottom unless ``top_down``."""
    ordered = rows if top_down else rows[::-1]
    return np.pad(ordered, ((0, 0), (0, -rows.shape[1] % 4))).astype(np.uint8).tobytes()


SIZE = (scenes.WIDTH, scenes.HEIGHT)


def cases() -> Iterator[Case]:
    """All cases of this format."""
    return chain(_indexed(), _true(), _masks(), _alpha(), _run_lengths(), _damaged())


def _indexed() -> Iterator[Case]:
    for size in (12, 40, 52, 56, 64, 108, 124):
        for bits in (1, 4, 8):
            for top_down in (False, True) if size in (40, 124) else (False,):
                head = Head(size=size, bits=bits, top_down=top_down)
                name = f"bmp/header-{size}/palette-{bits}{'-top-down' if top_down else ''}"
                yield Case(name, lambda h=head: _palette_made(h, 2**h.bits))
    for used in (2, 5, 200):
        bits = 4 if used < 16 else 8
        head = Head(bits=bits, used=used)
        yield Case(f"bmp/palette-of-{used}", lambda h=head: _palette_made(h, h.used))
    yield Case(  # Windows CE
        "bmp/palette-2-bits", lambda: _palette_made(Head(bits=2), 4), may_refuse=("broken",)
    )


def _palette_made(head: Head, colours: int) -> Made:
    samples = scenes.noise(1, 8) % colours
    palette = scenes.palette(colours)
    body = stored(packed_rows(samples, head.bits), top_down=head.top_down)
    # ImageMagick 6 takes a palette of OS/2 2 for one of OS/2 1, and does not know two bits.
    second = "" if head.size == 64 or head.bits == 2 else "magick"
    return Made(bmp(head, SIZE, body, palette), palette[samples[..., 0]], second=second)


def _true() -> Iterator[Case]:
    for size in (12, 40, 52, 56, 64, 108, 124):
        for top_down in (False, True) if size in (40, 56, 124) else (False,):
            head = Head(size=size, top_down=top_down)
            yield Case(
                f"bmp/header-{size}/rgb-24{'-top-down' if top_down else ''}",
                lambda h=head: _rgb_made(h),
            )
    for size in (40, 56, 108, 124):
        for bits in (16, 32):
            head = Head(size=size, bits=bits)
            yield Case(f"bmp/header-{size}/rgb-{bits}", lambda h=head: _plain_words(h))
    # Header of 16 bytes (OS/2 2): few write it, browsers differ.
    yield Case("bmp/header-16/rgb-24", _short_head, may_refuse=("broken", "format"))
    yield Case("bmp/gap-before-the-pixels", _gap)


def _rgb_made(head: Head) -> Made:
    samples = scenes.noise(3, 8)
    rows = samples[..., ::-1].reshape(samples.shape[0], -1)
    data = bmp(head, SIZE, stored(rows, top_down=head.top_down))
    return Made(data, scenes.rgb(samples), second="magick")


def _plain_words(head: Head) -> Made:
    """16 bits without masks are 5-5-5, 32 bits are 8-8-8 with a byte that is not used."""
    mask = MASKS["555" if head.bits == 16 else "888"]
    return _words(head, mask[1:])


def _short_head() -> Made:
    made = _rgb_made(Head())
    info = struct.pack("<IIIHH", 16, *SIZE, 1, 24)
    body = made.data[54:]
    data = b"BM" + struct.pack("<IHHI", 30 + len(body), 0, 0, 30) + info + body
    return Made(data, made.expected)


def _gap() -> Made:
    made = _rgb_made(Head())
    data = made.data[:10] + struct.pack("<I", 54 + 99) + made.data[14:54] + bytes(99)
    return Made(data + made.data[54:], made.expected)


def _width_of(mask: int) -> tuple[int, int]:
    """How many bits a mask has, and how far from the right."""
    shift = (mask & -mask).bit_length() - 1
    return (mask >> shift).bit_length(), shift


def _words(head: Head, masks: tuple[int, ...], alpha: Array | None = None) -> Made:
    words = np.zeros((scenes.HEIGHT, scenes.WIDTH), np.int64)
    levels = np.zeros((scenes.HEIGHT, scenes.WIDTH, 3))
    widest = 0
    for channel, mask in enumerate(masks[:3]):
        bits, shift = _width_of(mask)
        samples = scenes.noise(1, bits, seed=channel + 1)[..., 0]
        words |= samples << shift
        levels[..., channel] = scenes.eight(samples, bits)
        widest = max(widest, bits)
    expected = scenes.rgb(levels)
    within = EXACT if widest == 8 else ROUNDED
    if alpha is not None:
        bits, shift = _width_of(masks[3])
        words |= alpha.astype(np.int64) << shift
        expected, within = scenes.on_white(levels, alpha / (2**bits - 1)), ROUNDED
    little = words.astype(f"<u{head.bits // 8}")
    rows = little.view(np.uint8).reshape(scenes.HEIGHT, -1)
    data = bmp(head, SIZE, stored(rows, top_down=head.top_down))
    # 5 bits times 8 instead of 255 / 31 is off by up to 7: no viewer does so.
    return Made(data, expected, Within(max(within.most, 1), 0.8) if widest != 8 else within)


def _masks() -> Iterator[Case]:
    for name, (bits, *masks) in MASKS.items():
        for size in (40, 52, 56, 108, 124):
            head = Head(size=size, bits=bits, compression=BITFIELDS, masks=(*masks, 0))
            yield Case(
                f"bmp/header-{size}/masks-{name}",
                lambda h=head, m=tuple(masks): _words(h, m),
                # Masks of other than the common places are rare: no pixels rather than wrong ones.
                may_refuse=("broken",)
                if name in ("444", "101010", "888-high", "888-reversed")
                else (),
            )


def _alpha() -> Iterator[Case]:
    ramp = np.arange(scenes.WIDTH)[None, :].repeat(scenes.HEIGHT, 0) * 255 // (scenes.WIDTH - 1)
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    for size in (56, 108, 124):
        head = Head(size=size, bits=32, compression=BITFIELDS, masks=masks)
        yield Case(f"bmp/header-{size}/alpha", lambda h=head: _words(h, masks, ramp))
        yield Case(
            f"bmp/header-{size}/alpha-solid", lambda h=head: _words(h, masks, 0 * ramp + 255)
        )
        # All of it 0: nobody meant an empty picture.
        yield Case(f"bmp/header-{size}/alpha-all-0", lambda h=head: _unused(h, masks, 0))
    for size in (40, 108, 124):  # without masks the fourth byte means nothing
        for fill in (0, 255):
            head = Head(size=size, bits=32)
            yield Case(
                f"bmp/header-{size}/unused-{fill}", lambda h=head, f=fill: _unused(h, masks, f)
            )


def _unused(head: Head, masks: tuple[int, ...], fill: int) -> Made:
    made = _words(head, masks, np.full((scenes.HEIGHT, scenes.WIDTH), fill))
    opaque = _words(head, masks[:3])
    return Made(made.data, opaque.expected, opaque.within)


# --- run lengths ----------------------------------------------------------------------------------


def _run_lengths() -> Iterator[Case]:
    for bits in (4, 8):
        for way in ("runs", "absolute", "mixed"):
            yield Case(f"bmp/rle{bits}/{way}", lambda b=bits, w=way: _rle(b, w))
        yield Case(f"bmp/rle{bits}/without-the-end", lambda b=bits: _rle(b, "mixed", end=b""))
        yield Case(f"bmp/rle{bits}/jumps", lambda b=bits: _jumps(b), may_refuse=("broken",))


def _rle(bits: int, way: str, end: bytes = b"\0\1") -> Made:
    samples = scenes.noise(1, bits)[..., 0]
    if way != "absolute":
        samples = np.repeat(samples[:, ::5], 5, 1)[:, : scenes.WIDTH]
    out = b""
    for number, row in enumerate(samples[::-1]):
        absolute = way == "absolute" or (way == "mixed" and number % 2)
        out += (_absolute if absolute else _runs)(row.tolist(), bits) + b"\0\0"
    out = out[:-2] + (b"\0\0" + end if end else b"\0\0")
    head = Head(bits=bits, compression=RLE4 if bits == 4 else RLE8)
    palette = scenes.palette(2**bits)
    return Made(bmp(head, SIZE, out, palette), palette[samples], second="magick")


def _runs(row: list[int], bits: int) -> bytes:
    out, at = bytearray(), 0
    while at < len(row):
        end = at
        while end < len(row) and row[end] == row[at]:
            end += 1
        out += bytes([end - at, row[at] if bits == 8 else row[at] * 17])
        at = end
    return bytes(out)


def _absolute(row: list[int], bits: int) -> bytes:
    if bits == 8:
        packed = bytes(row)
    else:
        even = row + [0] * (len(row) % 2)
        packed = bytes(a << 4 | b for a, b in zip(even[::2], even[1::2], strict=True))
    return bytes([0, len(row)]) + packed + bytes(len(packed) % 2)


def _jumps(bits: int) -> Made:
    """What is jumped over has the palette's first colour, as most viewers have it."""
    samples = np.zeros((scenes.HEIGHT, scenes.WIDTH), np.int64)
    samples[scenes.HEIGHT - 1, :5] = 3  # the lowest row is the first
    samples[scenes.HEIGHT - 4, 9:14] = 2
    index = (3, 2) if bits == 8 else (0x33, 0x22)
    body = bytes([5, index[0], 0, 2, 4, 3, 5, index[1], 0, 1])
    head = Head(bits=bits, compression=RLE4 if bits == 4 else RLE8)
    palette = scenes.palette(2**bits)
    palette[0] = 255  # laid on white, what is clear looks the same
    return Made(bmp(head, SIZE, body, palette), palette[samples])


def _damaged() -> Iterator[Case]:
    made = _rgb_made(Head())
    sound, expected = made.data, made.expected
    harmless = {
        "file-size-0": sound[:2] + bytes(4) + sound[6:],
        "file-size-wrong": sound[:2] + b"\xff\xff\xff\x7f" + sound[6:],
        "reserved-set": sound[:6] + b"abcd" + sound[10:],
        "planes-0": sound[:26] + b"\0\0" + sound[28:],
        "image-size-0": sound[:34] + bytes(4) + sound[38:],
        "image-size-wrong": sound[:34] + b"\xff\xff\xff\x7f" + sound[38:],
        "resolution-odd": sound[:38] + b"\xff" * 8 + sound[46:],
        "behind": sound + b"and more" * 99,
    }
    for name, data in harmless.items():
        yield Case(f"bmp/metadata-broken/{name}", lambda d=data: Made(d, expected))
    profile = bmp(Head(size=124), SIZE, sound[54:])
    linked = profile[:70] + b"DEBM" + profile[74:126] + struct.pack("<II", 1 << 30, 1 << 30)
    linked += profile[134:]
    yield Case("bmp/metadata-broken/profile-far", lambda: Made(linked, expected))

    def with_sides(width: int, height: int) -> bytes:
        return sound[:18] + struct.pack("<ii", width, height) + sound[26:]

    broken = {
        **{f"cut-at-{p}-percent": sound[: len(sound) * p // 100] for p in (1, 30, 60, 95)},
        "width-0": with_sides(0, 20),
        "bits-7": sound[:28] + b"\x07\0" + sound[30:],
        "bits-0": sound[:28] + b"\0\0" + sound[30:],
        "compression-99": sound[:30] + b"\x63\0\0\0" + sound[34:],
        "jpeg-inside": sound[:30] + b"\4\0\0\0" + sound[34:],
        "pixels-far": sound[:10] + b"\xff\xff\xff\x7f" + sound[14:],
    }
    for name, data in broken.items():
        yield refusal(f"bmp/broken/{name}", data, "broken")
    negative = with_sides(-scenes.WIDTH, scenes.HEIGHT)
    yield refusal("bmp/broken/width-negative", negative, "broken", "pixels")
    cut = _rle(8, "mixed").data
    yield refusal("bmp/broken/rle-cut", cut[: len(cut) - 400], "broken")
    header_of_99 = sound[:14] + struct.pack("<I", 99) + sound[18:]
    yield refusal("bmp/broken/header-of-99", header_of_99, "broken", "format")
    yield refusal("bmp/small/15x15", bmp(Head(), (15, 15), bytes(48 * 15)), "small")
