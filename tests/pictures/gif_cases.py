"""GIF by hand (GIF89a): depths, palettes, interlace, frames smaller than their screen."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from pictures import scenes
from pictures.case import Array, Case, Made, refusal


@dataclass(frozen=True)
class Frame:
    """Indices (h, w), where they lie, and what is with them."""

    indices: Array
    left: int = 0
    top: int = 0
    local: Array | None = None
    interlaced: bool = False
    transparent: int | None = None
    disposal: int = 0


def gif(
    screen: tuple[int, int],
    frames: list[Frame],
    palette: Array | None,
    *,
    version: bytes = b"89a",
    background: int = 0,
    extensions: bytes = b"",
    end: bytes = b";",
    clear_each: int = 0,
) -> bytes:
    """A whole file; palettes are filled up to powers of two."""
    out = b"GIF" + version + struct.pack("<HH", *screen)
    out += bytes([0 if palette is None else 0xF0 | _depth(palette) - 1, background, 0])
    out += _table(palette) + extensions
    for frame in frames:
        if frame.transparent is not None or frame.disposal:
            flags = frame.disposal << 2 | (frame.transparent is not None)
            out += b"!\xf9\x04" + bytes([flags, 5, 0, frame.transparent or 0, 0])
        height, width = frame.indices.shape
        flags = (0x40 if frame.interlaced else 0) | (
            0 if frame.local is None else 0x80 | _depth(frame.local) - 1
        )
        out += b"," + struct.pack("<4HB", frame.left, frame.top, width, height, flags)
        out += _table(frame.local)
        used = frame.local if frame.local is not None else palette
        bits = max(2, 8 if used is None else _depth(used))
        rows = frame.indices
        if frame.interlaced:
            order = chain(*(range(a, height, b) for a, b in ((0, 8), (4, 8), (2, 4), (1, 2))))
            rows = rows[list(order)]
        out += bytes([bits]) + _blocks(lzw(rows.ravel().tolist(), bits, clear_each))
    return out + end


def _depth(palette: Array) -> int:
    return max(1, (len(palette) - 1).bit_length())


def _table(palette: Array | None) -> bytes:
    if palette is None:
        return b""
    return palette.astype(np.uint8).tobytes().ljust(3 * 2 ** _depth(palette), b"\0")


def _blocks(data: bytes) -> bytes:
    parts = (data[at : at + 255] for at in range(0, len(data), 255))
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\0"


def lzw(values: list[int], bits: int, clear_each: int = 0, *, end: bool = True) -> bytes:
    """Appendix F: codes from ``bits`` + 1 to 12 bits; with ``clear_each`` nothing is compressed.

    A table that is full stays, so that decoders must not clear it on their own.
    """
    codes = _uncompressed(values, bits, clear_each) if clear_each else _strings(values, bits)
    if not end:
        codes.pop()
    out = held = 0
    for code, width in codes:
        out |= code << held
        held += width
    return out.to_bytes((held + 7) // 8, "little")


def _uncompressed(values: list[int], bits: int, clear_each: int) -> list[tuple[int, int]]:
    clear, size = 1 << bits, bits + 1
    codes = [(clear, size)]
    for number, value in enumerate(values):
        if number and number % clear_each == 0:
            codes.append((clear, size))
        codes.append((value, size))
    return [*codes, (clear + 1, size)]


def _strings(values: list[int], bits: int) -> list[tuple[int, int]]:
    clear, size = 1 << bits, bits + 1
    codes = [(clear, size)]
    known: dict[tuple[int, int], int] = {}
    after, prefix = clear + 2, values[0]
    for value in values[1:]:
        if (prefix, value) in known:
            prefix = known[prefix, value]
            continue
        codes.append((prefix, size))
        if after < 4096:
            known[prefix, value] = after
            size += after == 1 << size and size < 12
            after += 1
        prefix = value
    codes.append((prefix, size))
    size += after == 1 << size and size < 12
    return [*codes, (clear + 1, size)]


SCREEN = (scenes.WIDTH, scenes.HEIGHT)


def _indices(colours: int, size: tuple[int, int] = SCREEN, seed: int = 1) -> Array:
    return scenes.noise(1, 8, width=size[0], height=size[1], seed=seed)[..., 0] % colours


def cases() -> Iterator[Case]:
    """All cases of this format."""
    return chain(_kinds(), _screens(), _animations(), _around(), _damaged())


def _kinds() -> Iterator[Case]:
    for bits in range(1, 9):
        for interlaced in (False, True):
            for where in ("global", "local"):
                name = f"gif/{where}-{2**bits}{'-interlaced' if interlaced else ''}"
                yield Case(name, lambda b=bits, i=interlaced, w=where: _plain(b, i, w))
        yield Case(f"gif/transparent-{2**bits}", lambda b=bits: _transparent(b))
    yield Case("gif/87a", lambda: _plain(4, False, "global", version=b"87a"))
    yield Case("gif/uncompressed", lambda: _plain(7, False, "global", clear_each=100))
    yield Case("gif/full-table", _full_table)
    yield Case("gif/palette-of-5", _odd_palette)


def _plain(bits: int, interlaced: bool, where: str, **style: object) -> Made:
    palette, indices = scenes.palette(2**bits), _indices(2**bits)
    local = palette if where == "local" else None
    others = scenes.palette(2**bits, seed=99) if bits % 2 else None
    frame = Frame(indices, local=local, interlaced=interlaced)
    data = gif(SCREEN, [frame], palette if local is None else others, **style)
    return Made(data, palette[indices], second="vips")


def _transparent(bits: int) -> Made:
    palette, indices = scenes.palette(2**bits), _indices(2**bits)
    data = gif(SCREEN, [Frame(indices, transparent=1)], palette)
    expected = scenes.on_white(palette[indices], (indices != 1).astype(float))
    return Made(data, expected, second="vips")


def _full_table() -> Made:
    """More strings than 4,096 codes can name, and no clear code after them."""
    size = (150, 140)
    palette, indices = scenes.palette(256), _indices(256, size)
    return Made(gif(size, [Frame(indices)], palette), palette[indices], second="vips")


def _odd_palette() -> Made:
    palette, indices = scenes.palette(5), _indices(5)
    return Made(gif(SCREEN, [Frame(indices)], palette), palette[indices], second="vips")


def _laid(screen: tuple[int, int], frame: Frame, palette: Array) -> Array:
    """A frame on a clear screen, which is white then; what does not fit is cut."""
    shown = np.full((screen[1], screen[0], 3), 255, np.uint8)
    height, width = frame.indices.shape
    part = shown[frame.top : frame.top + height, frame.left : frame.left + width]
    kept = frame.indices[: part.shape[0], : part.shape[1]]
    solid = np.ones_like(kept, bool) if frame.transparent is None else kept != frame.transparent
    part[solid] = palette[kept][solid]
    return shown


def _screens() -> Iterator[Case]:
    for left, top in ((0, 0), (5, 9), (20, 10), (0, 10)):
        for background in (0, 3):
            for transparent in (None, 2):
                for interlaced in (False, True):
                    frame = Frame(_indices(16, (20, 16)), left, top, None, interlaced, transparent)
                    name = f"gif/screen/at-{left}-{top}-background-{background}"
                    name += f"{'-transparent' if transparent else ''}"
                    name += f"{'-interlaced' if interlaced else ''}"
                    yield Case(name, lambda f=frame, b=background: _small(f, b))
    # Beyond the screen: Chromium makes the screen larger, Firefox cuts the frame.
    wide = Frame(_indices(16, (60, 40)))
    yield Case(
        "gif/screen/frame-larger",
        lambda: Made(gif((60, 40), [wide], scenes.palette(16)), scenes.palette(16)[wide.indices]),
    )
    local = Frame(_indices(4, (20, 16)), 3, 3, scenes.palette(4, seed=5))
    yield Case(
        "gif/screen/local-palette",
        lambda: Made(
            gif((48, 40), [local], scenes.palette(16)),
            _laid((48, 40), local, scenes.palette(4, seed=5)),
        ),
    )


def _small(frame: Frame, background: int) -> Made:
    palette = scenes.palette(16)
    data = gif((48, 40), [frame], palette, background=background)
    # libvips leaves alpha out where no colour is transparent, and shows a black screen then.
    second = "" if frame.transparent is None else "vips"
    return Made(data, _laid((48, 40), frame, palette), second=second)


def _animations() -> Iterator[Case]:
    palette = scenes.palette(32)
    first = Frame(_indices(32), transparent=4)
    others = [Frame(_indices(32, (20, 16), seed=n), n, n, transparent=7) for n in range(5)]
    shown = _laid(SCREEN, first, palette)
    for disposal in range(4):
        frames = [Frame(first.indices, transparent=4, disposal=disposal), *others]
        data = gif(SCREEN, frames, palette)
        yield Case(f"gif/animation/disposal-{disposal}", lambda d=data: Made(d, shown))
    cut = gif(SCREEN, [first, *others], palette)
    alone = len(gif(SCREEN, [first], palette)) - 1
    yield Case("gif/animation/cut-behind-the-first", lambda: Made(cut[:alone], shown))
    yield Case("gif/animation/cut-in-the-second", lambda: Made(cut[: alone + 60], shown))
    noise = cut[: alone + 30] + b"\xff" * 60 + cut[alone + 90 :]
    yield Case("gif/animation/second-frame-broken", lambda: Made(noise, shown))
    yield Case(
        "gif/animation/1501-frames",
        lambda: Made(gif(SCREEN, [first, *others * 300], palette), shown),
    )


def _around() -> Iterator[Case]:
    netscape = b"!\xff\x0bNETSCAPE2.0\x03\1\0\0\0"
    extensions = {
        "comment": b"!\xfe\5hello\0",
        "loop": netscape,
        "loop-short": b"!\xff\x0bNETSCAPE2.0\0",
        "xmp": b"!\xff\x0bXMP DataXMP" + b"<x/>" * 60 + bytes([1, *range(255, -1, -1)]) + b"\0",
        "icc": b"!\xff\x0bICCRGBG1012\x05nonse\0",
        "plain-text": b"!\1\x0c" + bytes(12) + b"\2hi\0",
        "unknown": b"!\x77\4abcd\0",
        "unknown-empty": b"!\x77\0",
        "application-short": b"!\xff\3abc\0",
        "control-short": b"!\xf9\1\0\0",
        "comment-200-KB": b"!\xfe" + (b"\xff" + b"c" * 255) * 800 + b"\0",
    }
    palette, indices = scenes.palette(16), _indices(16)
    for name, extension in extensions.items():
        data = gif(SCREEN, [Frame(indices)], palette, extensions=extension)
        yield Case(f"gif/metadata/{name}", lambda d=data: Made(d, palette[indices]))
    sound = gif(SCREEN, [Frame(indices)], palette)
    ends = {
        "no-trailer": sound[:-1],
        "no-terminator": sound[:-2],
        "behind": sound + b"and more" * 99,
        "zeros-before-trailer": sound[:-1] + bytes(9) + b";",
        "aspect": sound[:12] + b"\x31" + sound[13:],
        "background-outside": sound[:11] + b"\xff" + sound[12:],
    }
    for name, data in ends.items():
        yield Case(f"gif/metadata-broken/{name}", lambda d=data: Made(d, palette[indices]))
    no_end = gif(SCREEN, [], palette, end=b"") + b"," + struct.pack("<4HB", 0, 0, *SCREEN, 0)
    no_end += b"\4" + _blocks(lzw(indices.ravel().tolist(), 4, end=False)) + b";"
    yield Case("gif/metadata-broken/no-end-code", lambda: Made(no_end, palette[indices]))


def _damaged() -> Iterator[Case]:
    palette, indices = scenes.palette(64), _indices(64)
    sound = gif(SCREEN, [Frame(indices)], palette)
    start = 13 + 64 * 3 + 10
    broken = {
        **{f"cut-at-{p}-percent": sound[: len(sound) * p // 100] for p in (5, 20, 50, 80, 95)},
        "no-frame": sound[: start - 10] + b";",
        "rows-lacking": gif(SCREEN, [], palette, end=b"")
        + b"," + struct.pack("<4HB", 0, 0, *SCREEN, 0)
        + b"\6" + _blocks(lzw(indices[:10].ravel().tolist(), 6)) + b";",
        "no-codes": sound[: start + 1] + b"\0;",
        "code-size-13": sound[:start] + b"\x0d" + sound[start + 1 :],
        "screen-0": sound[:6] + bytes(4) + sound[10 : start - 6] + bytes(4) + sound[start - 2 :],
    }  # fmt: skip
    for name, data in broken.items():
        yield refusal(f"gif/broken/{name}", data, "broken")
    tiny = gif((15, 30), [Frame(_indices(4, (15, 30)))], scenes.palette(4))
    yield refusal("gif/small/15x30", tiny, "small")
