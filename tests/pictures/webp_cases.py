"""WebP by cwebp, in containers by hand (RFC 9649): alpha, frames, profiles, turns, damage."""

import struct
from collections.abc import Iterator
from functools import cache
from itertools import chain

import numpy as np

from pictures import exif, profiles, scenes
from pictures.case import BLENDED, CONVERTED, Array, Case, Made, Within, refusal
from pictures.tools import as_png, run

LOSSY = Within(30, 4)
"""Chroma is halved always."""
ICC, ALPHA, EXIF, XMP, ANIMATION = 0x20, 0x10, 0x08, 0x04, 0x02


def riff(*chunks: bytes) -> bytes:
    """The file of these chunks."""
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk, to an even length."""
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def vp8x(flags: int, width: int, height: int) -> bytes:
    """The header of the extended format."""
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return chunk(b"VP8X", bytes([flags, 0, 0, 0]) + sides)


def pictures_of(data: bytes) -> bytes:
    """The chunks with pixels of a file: ALPH and VP8, or VP8L."""
    at, kept = 12, b""
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        end += end % 2
        if data[at : at + 4] in (b"ALPH", b"VP8 ", b"VP8L"):
            kept += data[at:end]
        at = end
    return kept


@cache
def _cwebp(*flags: str, channels: int = 3, seed: int = 1) -> bytes:
    return run("cwebp", "-quiet", *flags, "i.png", "-o", "o.webp", out="o.webp",
               i_png=as_png(_scene(channels, seed)))  # fmt: skip


def _scene(channels: int, seed: int = 1) -> Array:
    picture = scenes.smooth() if seed == 1 else scenes.smooth()[::-1, ::-1]
    if channels == 3:
        return picture
    return np.concatenate([picture, scenes.smooth_alpha()[..., None]], -1)


def _blended() -> Array:
    return scenes.on_white(scenes.smooth().astype(float), scenes.smooth_alpha() / 255)


def lossless() -> bytes:
    """The smooth picture, exactly."""
    return _cwebp("-lossless", "-exact")


def cases() -> Iterator[Case]:
    """All cases of this format."""
    return chain(_encoder(), _extended(), _frames(), _metadata(), _broken())


def _encoder() -> Iterator[Case]:
    for method in ("0", "3", "6"):
        yield Case(
            f"webp/lossless/method-{method}",
            lambda m=method: Made(_cwebp("-lossless", "-m", m), scenes.smooth(), second="vips"),
        )
        yield Case(
            f"webp/lossy/method-{method}",
            lambda m=method: Made(
                _cwebp("-q", "97", "-m", m), scenes.smooth(), LOSSY, second="vips"
            ),
        )
    for preset in ("photo", "drawing", "icon", "text"):
        yield Case(
            f"webp/lossy/{preset}",
            lambda p=preset: Made(_cwebp("-preset", p, "-q", "97"), scenes.smooth(), LOSSY),
        )
    yield Case(
        "webp/near-lossless",
        lambda: Made(_cwebp("-near_lossless", "60"), scenes.smooth(), Within(8, 2), second="vips"),
    )
    alphas = {"lossless": ("-lossless", "-exact"), "lossy": ("-q", "97"),
              "lossy-raw-alpha": ("-q", "97", "-alpha_method", "0"),
              "lossy-filtered-alpha": ("-q", "97", "-alpha_filter", "best")}  # fmt: skip
    for name, flags in alphas.items():
        within = BLENDED if name == "lossless" else LOSSY
        yield Case(
            f"webp/alpha/{name}",
            lambda f=flags, w=within: Made(_cwebp(*f, channels=4), _blended(), w, second="vips"),
        )
    for size in ((16, 16), (17, 33), (201, 19)):
        yield Case(f"webp/sizes/{size[0]}x{size[1]}", lambda s=size: _sized(s))


def _sized(size: tuple[int, int]) -> Made:
    samples = scenes.noise(3, 8, width=size[0], height=size[1])
    data = run("cwebp", "-quiet", "-lossless", "i.png", "-o", "o.webp", out="o.webp",
               i_png=as_png(samples))  # fmt: skip
    return Made(data, scenes.rgb(samples), second="vips")


def _whole(flags: int, before: bytes = b"", after: bytes = b"") -> bytes:
    return riff(vp8x(flags, 64, 48), before, pictures_of(lossless()), after)


def _extended() -> Iterator[Case]:
    for turn in range(1, 9):
        for prefix in (b"", exif.MARK):  # RFC 9649 has the bare block; others write JPEG's
            name = f"webp/exif/{turn}{'-with-mark' if prefix else ''}"
            yield Case(name, lambda t=turn, p=prefix: _turned(t, p))
    for space, colours in profiles.SPACES.items():
        for version in (2, 4):
            yield Case(
                f"webp/icc/{space}-v{version}",
                lambda c=colours, v=version: _with_profile(c, v),
            )
    yield Case("webp/icc/with-alpha", _profile_and_alpha)
    for name, icc in profiles.damaged().items():
        yield Case(
            f"webp/icc-broken/{name}",
            lambda i=icc: Made(_whole(ICC, chunk(b"ICCP", i)), scenes.smooth()),
        )
    for name, block in exif.damaged().items():
        yield Case(
            f"webp/exif-broken/{name}",
            lambda b=block: Made(_whole(EXIF, after=chunk(b"EXIF", b)), scenes.smooth()),
        )


def _turned(turn: int, prefix: bytes) -> Made:
    data = _whole(EXIF, after=chunk(b"EXIF", prefix + exif.exif(turn)))
    return Made(data, scenes.upright(scenes.smooth(), turn))


def _with_profile(colours: profiles.Colours, version: int) -> Made:
    data = _whole(ICC, chunk(b"ICCP", profiles.rgb_profile(colours, version)))
    expected = scenes.rgb(profiles.shown(scenes.smooth().astype(float), colours))
    return Made(data, expected, CONVERTED, second="vips", second_within=Within(4, 1))


def _profile_and_alpha() -> Made:
    pixels = pictures_of(_cwebp("-lossless", "-exact", channels=4))
    icc = chunk(b"ICCP", profiles.rgb_profile(profiles.SWAPPED))
    colours = profiles.shown(scenes.smooth().astype(float), profiles.SWAPPED)
    expected = scenes.on_white(colours, scenes.smooth_alpha() / 255)
    return Made(riff(vp8x(ICC | ALPHA, 64, 48), icc, pixels), expected, CONVERTED)


def _frame(left: int, top: int, pixels: bytes, width: int = 64, height: int = 48) -> bytes:
    def three(value: int) -> bytes:
        return struct.pack("<I", value)[:3]

    body = three(left // 2) + three(top // 2) + three(width - 1) + three(height - 1)
    return chunk(b"ANMF", body + three(100) + b"\0" + pixels)


def _frames() -> Iterator[Case]:
    def animation(size: tuple[int, int], *frames: bytes, background: bytes = b"\0\0\0\0") -> bytes:
        head = vp8x(ANIMATION | ALPHA, *size)
        return riff(head, chunk(b"ANIM", background + b"\0\0"), *frames)

    def first() -> bytes:
        return _frame(0, 0, pictures_of(lossless()))

    def second() -> bytes:
        return _frame(0, 0, pictures_of(_cwebp("-lossless", seed=2)))

    def placed() -> Array:
        canvas = np.full((70, 90, 3), 255, np.uint8)
        canvas[20:68, 10:74] = scenes.smooth()
        return canvas

    def inner(background: bytes) -> bytes:
        frame = _frame(10, 20, pictures_of(lossless()))
        return animation((90, 70), frame, second(), background=background)

    size = (64, 48)
    yield Case(
        "webp/animation/two", lambda: Made(animation(size, first(), second()), scenes.smooth())
    )
    yield Case("webp/animation/one", lambda: Made(animation(size, first()), scenes.smooth()))
    for name, background in (("clear", b"\0\0\0\0"), ("red", b"\0\0\xff\xff")):
        # Browsers leave the canvas clear, whatever the background (RFC 9649: a hint).
        yield Case(
            f"webp/animation/small-frame-{name}",
            lambda b=background: Made(inner(b), placed()),
        )
    yield Case(
        "webp/animation/300-frames",
        lambda: Made(animation(size, *[first(), second()] * 150), scenes.smooth()),
    )
    yield Case(
        "webp/animation/cut-in-the-second",
        lambda: Made(animation(size, first(), second())[:-200], scenes.smooth()),
        may_refuse=("broken",),
    )


def _metadata() -> Iterator[Case]:
    ways = {
        "xmp": lambda: _whole(XMP, after=chunk(b"XMP ", b"<x:xmpmeta/>")),
        "xmp-broken": lambda: _whole(XMP, after=chunk(b"XMP ", b"<<<\xff")),
        "unknown-behind": lambda: _whole(0, after=chunk(b"abcd", b"odd")),
        "unknown-before": lambda: _whole(0, chunk(b"abcd", b"odd")),
        "flags-without-chunks": lambda: _whole(ICC | EXIF | XMP),
        "chunks-without-flags": lambda: _whole(0, after=chunk(b"EXIF", exif.exif(1))),
        "behind": lambda: lossless() + b"and more" * 9,
        "exif-10-MB": lambda: _whole(EXIF, after=chunk(b"EXIF", exif.exif(1) + bytes(10 << 20))),
        "exif-cut": lambda: _whole(EXIF, after=chunk(b"EXIF", exif.exif(1) + bytes(900)))[:-300],
    }
    for name, make in ways.items():
        yield Case(f"webp/metadata/{name}", lambda m=make: Made(m(), scenes.smooth()))


def _broken() -> Iterator[Case]:
    def lossy() -> bytes:
        return _cwebp("-q", "97")

    for percent in (5, 30, 60, 95):
        yield refusal(
            f"webp/broken/cut-at-{percent}-percent",
            lambda p=percent: lossless()[: len(lossless()) * p // 100],
            "broken",
        )
        yield refusal(
            f"webp/broken/lossy-cut-at-{percent}-percent",
            lambda p=percent: lossy()[: len(lossy()) * p // 100], "broken",
        )  # fmt: skip
    ways = {
        "no-pixels": lambda: riff(vp8x(0, 64, 48)),
        "riff-alone": lambda: riff(),
        "lossless-mark": lambda: lossless().replace(b"\x2f", b"\x30", 1),
        "lossy-mark": lambda: lossy().replace(b"\x9d\x01\x2a", b"\x9d\x01\x2b", 1),
        "canvas-of-other-size": lambda: riff(vp8x(0, 99, 99), pictures_of(lossless())),
        "zeros": lambda: lossless()[:20] + bytes(len(lossless()) - 20),
        "animation-without-frames": lambda: riff(vp8x(ANIMATION, 64, 48), chunk(b"ANIM", bytes(6))),
    }
    for name, make in ways.items():
        yield refusal(f"webp/broken/{name}", make, "broken")
