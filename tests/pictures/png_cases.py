"""PNG: every type and depth by hand, and what is around the pixels, sound and damaged."""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from pictures import exif, profiles, scenes
from pictures.case import BLENDED, CONVERTED, EXACT, ROUNDED, Array, Case, Made, Within, refusal
from pictures.png_writer import (
    CHANNELS,
    GREY,
    GREY_ALPHA,
    INDEXED,
    PLAIN,
    RGB,
    RGBA,
    SIGNATURE,
    Style,
    chunk,
    header,
    idat,
    png,
    rows,
)

KINDS = {
    **{f"grey-{bits}": (GREY, bits) for bits in (1, 2, 4, 8, 16)},
    **{f"rgb-{bits}": (RGB, bits) for bits in (8, 16)},
    **{f"palette-{bits}": (INDEXED, bits) for bits in (1, 2, 4, 8)},
    **{f"grey-alpha-{bits}": (GREY_ALPHA, bits) for bits in (8, 16)},
    **{f"rgba-{bits}": (RGBA, bits) for bits in (8, 16)},
}


def cases() -> Iterator[Case]:
    """All cases of this format."""
    return chain(
        _kinds(), _rows(), _transparency(), _profiles(), _numbers(), _orientations(),
        _damaged_metadata(), _animations(), _damaged_pixels(),
    )  # fmt: skip


def _palette_of(colour: int, bits: int) -> Array | None:
    return scenes.palette(2**bits) if colour == INDEXED else None


def shown(samples: Array, bits: int, colour: int) -> tuple[Array, Within]:
    """What these samples show, and how exactly."""
    if colour == INDEXED:
        return scenes.palette(2**bits)[samples[..., 0]], EXACT
    levels = scenes.eight(samples, bits)
    within = ROUNDED if bits == 16 else EXACT
    if colour in (GREY_ALPHA, RGBA):
        return scenes.on_white(levels[..., :-1], levels[..., -1] / 255), BLENDED
    return scenes.rgb(levels), within


def _made(
    colour: int,
    bits: int,
    style: Style = PLAIN,
    *,
    size: tuple[int, int] = (scenes.WIDTH, scenes.HEIGHT),
    **chunks: bytes,
) -> Made:
    samples = scenes.noise(CHANNELS[colour], bits, width=size[0], height=size[1])
    data = png(samples, bits, colour, style, palette=_palette_of(colour, bits), **chunks)
    expected, within = shown(samples, bits, colour)
    return Made(data, expected, within, second="vips", second_within=Within(3, 1))


def _case(name: str, colour: int, bits: int, style: Style = PLAIN, **chunks: bytes) -> Case:
    return Case(f"png/{name}", lambda: _made(colour, bits, style, **chunks))


def _kinds() -> Iterator[Case]:
    for name, (colour, bits) in KINDS.items():
        for interlaced in (False, True):
            style = Style(interlaced=interlaced, filters=(0, 1, 2, 3, 4))
            yield _case(f"kinds/{name}{'-adam7' if interlaced else ''}", colour, bits, style)
    # Sides at which passes of Adam7 are empty or cut.
    for size in ((16, 16), (17, 23), (16, 40), (33, 16)):
        for colour, bits in ((GREY, 1), (RGB, 8), (RGBA, 16)):
            name = f"png/sizes/{size[0]}x{size[1]}-type-{colour}"
            yield Case(
                name, lambda c=colour, b=bits, s=size: _made(c, b, Style(True, (4,)), size=s)
            )


def _rows() -> Iterator[Case]:
    for kind in range(5):
        for name in ("grey-4", "rgb-8", "rgb-16", "grey-alpha-8"):
            yield _case(f"filters/{kind}-{name}", *KINDS[name], Style(filters=(kind,)))
    for split in (1, 7, 100):
        yield _case(f"idat/split-{split}", RGB, 8, Style(split=split))
    yield _case("idat/stored", RGB, 8, Style(level=0))
    yield _case("idat/best", RGB, 8, Style(level=9))

    def rearranged(change: Callable[[bytes], bytes]) -> Made:
        samples = scenes.noise(3, 8)
        body = change(rows(samples, 8))
        data = SIGNATURE + header(scenes.WIDTH, scenes.HEIGHT, 8, RGB) + body
        return Made(data + chunk(b"IEND", b""), scenes.rgb(samples), second="vips")

    empty = chunk(b"IDAT", b"")
    yield Case("png/idat/empty-before", lambda: rearranged(lambda raw: empty + idat(raw)))
    yield Case("png/idat/empty-behind", lambda: rearranged(lambda raw: idat(raw) + empty))
    yield Case("png/idat/more-rows", lambda: rearranged(lambda raw: idat(raw + bytes(999))))


def _transparency() -> Iterator[Case]:
    for name, (colour, bits) in KINDS.items():
        if colour in (GREY, RGB, INDEXED):
            for style in (PLAIN, Style(interlaced=True)):
                yield Case(
                    f"png/trns/{name}{'-adam7' if style.interlaced else ''}",
                    lambda c=colour, b=bits, s=style: _keyed(c, b, s),
                )
    yield Case("png/trns/rgb-16-by-the-low-byte", lambda: _low_byte(RGB))
    yield Case("png/trns/grey-16-by-the-low-byte", lambda: _low_byte(GREY))
    for entries in (0, 1, 100, 256):
        yield Case(f"png/trns/palette-of-{entries}", lambda n=entries: _palette_alpha(n))


def _keyed(colour: int, bits: int, style: Style) -> Made:
    samples = scenes.noise(CHANNELS[colour], bits)
    if colour == INDEXED:
        alphas = np.random.default_rng(3).integers(0, 256, 2**bits)
        expected = scenes.on_white(
            scenes.palette(2**bits)[samples[..., 0]], alphas[samples[..., 0]] / 255
        )
        trns = alphas.astype(np.uint8).tobytes()
    else:
        samples[5:9, 7:20] = samples[5, 7]
        key = samples[5, 7]
        solid = (samples != key).any(-1)
        expected = scenes.on_white(scenes.eight(samples, bits), solid.astype(float))
        trns = key.astype(">u2").tobytes()
    data = png(samples, bits, colour, style, palette=_palette_of(colour, bits), trns=trns)
    return Made(data, expected, BLENDED, second="vips")


def _low_byte(colour: int) -> Made:
    """Of two colours whose high bytes are equal, one is transparent."""
    channels = CHANNELS[colour]
    samples = np.full((scenes.HEIGHT, scenes.WIDTH, channels), 0x40A0)
    samples[:, 18:] = 0x40A1
    solid = (samples != 0x40A0).any(-1)
    expected = scenes.on_white(scenes.eight(samples, 16), solid.astype(float))
    data = png(samples, 16, colour, trns=struct.pack(">H", 0x40A0) * channels)
    return Made(data, expected, BLENDED, second="vips")


def _palette_alpha(entries: int) -> Made:
    """What tRNS leaves out is opaque."""
    samples = scenes.noise(1, 8)
    alphas = np.concatenate([np.arange(entries) % 256, np.full(256 - entries, 255)])
    colours = scenes.palette(256)[samples[..., 0]]
    data = png(
        samples, 8, INDEXED, palette=scenes.palette(256), trns=bytes(alphas[:entries].tolist())
    )
    return Made(data, scenes.on_white(colours, alphas[samples[..., 0]] / 255), BLENDED)


# --- colours --------------------------------------------------------------------------------------


def iccp(icc: bytes, name: bytes = b"corpus") -> bytes:
    """A chunk iCCP."""
    return chunk(b"iCCP", name + b"\0\0" + zlib.compress(icc))


def _profiles() -> Iterator[Case]:
    for space, colours in profiles.SPACES.items():
        for version in (2, 4):
            yield Case(
                f"png/icc/{space}-v{version}",
                lambda c=colours, v=version: _with_profile(RGB, 8, c, v),
            )
        for name in ("rgb-16", "rgba-8", "rgba-16", "palette-8", "palette-2"):
            colour, bits = KINDS[name]
            yield Case(
                f"png/icc/{space}-{name}",
                lambda c=colours, k=colour, b=bits: _with_profile(k, b, c, 4),
            )
    for gamma in (1.8, 2.2, None):
        for name in ("grey-1", "grey-4", "grey-8", "grey-16", "grey-alpha-8", "grey-alpha-16"):
            yield Case(
                f"png/icc/grey-{gamma or 'srgb'}-{name}",
                lambda g=gamma, k=KINDS[name]: _with_grey_profile(*k, g),
            )
    yield Case("png/icc/table", _with_table)
    yield Case(
        "png/icc/grey-picture-rgb-profile-without-effect",
        lambda: _made(GREY, 8, before=iccp(profiles.rgb_profile(profiles.SWAPPED))),
    )
    for name, icc in profiles.damaged().items():
        yield Case(f"png/icc-broken/{name}", lambda i=icc: _made(RGB, 8, before=iccp(i)))
        yield Case(f"png/icc-broken/{name}-rgba", lambda i=icc: _made(RGBA, 8, before=iccp(i)))
    grey = profiles.grey_profile(1.0)
    yield Case("png/icc-broken/grey-profile-of-rgb", lambda: _made(RGB, 8, before=iccp(grey)))
    yield Case("png/icc-broken/giant", lambda: _made(RGB, 8, before=iccp(_giant())))


def _giant() -> bytes:
    return profiles.rgb_profile(profiles.SRGB) + bytes(24 << 20)


def _with_profile(colour: int, bits: int, space: profiles.Colours, version: int) -> Made:
    samples = scenes.noise(CHANNELS[colour], bits)
    icc = profiles.rgb_profile(space, version)
    data = png(samples, bits, colour, palette=_palette_of(colour, bits), before=iccp(icc))
    if colour == INDEXED:
        levels, alpha = scenes.palette(2**bits)[samples[..., 0]].astype(float), None
    else:
        levels = scenes.eight(samples, bits)
        alpha = levels[..., 3] / 255 if colour == RGBA else None
    expected = profiles.shown(levels[..., :3], space)
    # Browsers, too, make 8 bits of 16 before they convert, which moves dark colours by some.
    within = Within(14, 1) if bits == 16 else CONVERTED
    return Made(
        data,
        scenes.rgb(expected) if alpha is None else scenes.on_white(expected, alpha),
        within,
        second="vips" if bits == 8 else "",
        second_within=Within(4, 1),
    )


def _with_grey_profile(colour: int, bits: int, gamma: float | None) -> Made:
    samples = scenes.noise(CHANNELS[colour], bits)
    levels = scenes.eight(samples, bits)
    expected = profiles.srgb_levels(profiles.linear(levels[..., :1], gamma))
    data = png(samples, bits, colour, before=iccp(profiles.grey_profile(gamma)))
    if colour == GREY_ALPHA:
        return Made(data, scenes.on_white(expected, levels[..., 1] / 255), CONVERTED)
    return Made(data, scenes.rgb(expected), CONVERTED)


def _with_table() -> Made:
    samples = scenes.noise(3, 8)
    icc = profiles.table_profile(b"RGB ", profiles.swapped_lab, kind=b"mntr")
    expected = scenes.rgb(profiles.by_littlecms(samples, icc, "RGB"))
    return Made(png(samples, 8, RGB, before=iccp(icc)), expected, CONVERTED)


def _gama(gamma: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(100_000 / gamma)))


def _chrm(colours: profiles.Colours) -> bytes:
    points = (colours.white, colours.red, colours.green, colours.blue)
    return chunk(b"cHRM", b"".join(struct.pack(">I", round(1e5 * v)) for p in points for v in p))


def _numbers() -> Iterator[Case]:
    """PNG (third edition), 4.3: cICP before iCCP before sRGB before gAMA and cHRM."""
    p3, swapped, srgb = profiles.DISPLAY_P3, profiles.SWAPPED, chunk(b"sRGB", b"\0")
    plain = profiles.SRGB
    icc = iccp(profiles.rgb_profile(p3))
    both = _gama(2.2) + _chrm(swapped._replace(gamma=2.2))
    told: dict[str, tuple[bytes, profiles.Colours]] = {
        "srgb": (srgb, plain),
        "srgb-with-its-gama-and-chrm": (srgb + _gama(2.2) + _chrm(plain), plain),
        "srgb-over-gama-and-chrm": (srgb + both, plain),
        "icc-over-gama-and-chrm": (icc + both, p3),
        "icc-over-srgb": (icc + srgb, p3),
        "gama-and-chrm": (both, swapped._replace(gamma=2.2)),
        "gama-1.8-and-chrm": (_gama(1.8) + _chrm(plain), plain._replace(gamma=1.8)),
        "gama-2.2-alone": (_gama(2.2), plain),
        "cicp-srgb": (chunk(b"cICP", bytes([1, 13, 0, 1])), plain),
        "cicp-display-p3": (chunk(b"cICP", bytes([12, 13, 0, 1])), p3),
        "cicp-over-all": (chunk(b"cICP", bytes([12, 13, 0, 1])) + iccp(
            profiles.rgb_profile(swapped)) + srgb + both, p3),
    }  # fmt: skip
    for name, (chunks, colours) in told.items():
        yield Case(f"png/numbers/{name}", lambda x=chunks, c=colours: _told(x, c))
    useless = {
        "gama-0": chunk(b"gAMA", bytes(4)),
        "gama-short": chunk(b"gAMA", b"\0\0"),
        "gama-2^32": chunk(b"gAMA", b"\xff" * 4),
        "chrm-zeros": _gama(2.2) + chunk(b"cHRM", bytes(32)),
        "chrm-short": chunk(b"cHRM", bytes(7)),
        "srgb-intent-9": chunk(b"sRGB", b"\x09"),
        "cicp-reserved": chunk(b"cICP", bytes([3, 3, 3, 3])),
        "cicp-unspecified": chunk(b"cICP", bytes([2, 2, 0, 1])),
        "cicp-short": chunk(b"cICP", b"\x01"),
    }
    for name, chunks in useless.items():
        yield Case(f"png/numbers-broken/{name}", lambda x=chunks: _told(x, plain))


def _told(chunks: bytes, colours: profiles.Colours) -> Made:
    samples = scenes.noise(3, 8)
    expected = scenes.rgb(profiles.shown(samples, colours))
    # A gamma within 5 % of sRGB's curve is taken for it by libpng, and so by browsers.
    within = Within(10, 3) if colours.gamma == 2.2 else CONVERTED
    return Made(png(samples, 8, RGB, before=chunks), expected, within)


# --- around the pixels ----------------------------------------------------------------------------


def _orientations() -> Iterator[Case]:
    for turn in range(1, 9):
        for order in "<>":
            for name in ("rgb-8", "palette-4") if order == "<" else ("grey-16",):
                yield Case(
                    f"png/exif/{turn}-{'II' if order == '<' else 'MM'}-{name}",
                    lambda t=turn, o=order, n=name: _turned(t, o, *KINDS[n]),
                )
    for name, block in exif.damaged().items():
        yield _case(f"exif-broken/{name}", RGB, 8, before=chunk(b"eXIf", block))


def _turned(turn: int, order: str, colour: int, bits: int) -> Made:
    made = _made(colour, bits, before=chunk(b"eXIf", exif.exif(turn, order=order)))
    assert made.expected is not None
    return Made(made.data, scenes.upright(made.expected, turn), made.within)


def _damaged_metadata() -> Iterator[Case]:
    bodies = {
        "tEXt": b"Comment\0words", "zTXt": b"Comment\0\0" + zlib.compress(b"words"),
        "iTXt": b"Comment\0\0\0\0\0words", "pHYs": struct.pack(">IIB", 2835, 2835, 1),
        "tIME": bytes([7, 234, 1, 1, 0, 0, 0]), "gAMA": struct.pack(">I", 100_000),
        "eXIf": exif.exif(6), "bKGD": bytes([0, 255, 0, 0, 0, 9]), "sPLT": b"p\0\x08" + bytes(6),
        "sBIT": bytes([8, 8, 8]), "hIST": bytes(6), "oFFs": bytes(9), "prVt": b"any bytes at all",
        "iCCP": b"c\0\0" + zlib.compress(profiles.rgb_profile(profiles.SWAPPED)),
        "sRGB": b"\0", "vpAg": bytes(9), "caBX": b"jumb" * 99,
    }  # fmt: skip
    inert = set(bodies) - {"gAMA", "eXIf", "iCCP"}
    for name in sorted(inert):
        yield _case(f"metadata/{name}", RGB, 8, before=chunk(name.encode(), bodies[name]))
        yield _case(f"metadata/{name}-behind", RGB, 8, after=chunk(name.encode(), bodies[name]))
    for name, body in bodies.items():  # a chunk whose checksum is wrong counts as none
        damaged = chunk(name.encode(), body, checksum=1)
        yield Case(  # libvips uses a profile whose checksum is wrong
            f"png/checksum/{name}", lambda c=damaged: replace(_made(RGB, 8, before=c), second="")
        )
    for name in ("tEXt", "prVt"):
        body = chunk(name.encode(), bodies[name], checksum=1)
        yield _case(f"checksum/{name}-behind", RGB, 8, after=body)
    broken = {
        "zTXt-not-packed": chunk(b"zTXt", b"k\0\0not packed"),
        "zTXt-method-9": chunk(b"zTXt", b"k\0\x09" + zlib.compress(b"words")),
        "zTXt-cut": chunk(b"zTXt", b"k\0\0" + zlib.compress(b"words" * 99)[:9]),
        "zTXt-30-MB": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(30 << 20), 1)),
        "iTXt-30-MB": chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(30 << 20), 1)),
        "iTXt-cut": chunk(b"iTXt", b"k\0"),
        "iTXt-no-utf8": chunk(b"iTXt", b"k\0\0\0\0\0\xff\xfe\xfd"),
        "tEXt-empty": chunk(b"tEXt", b""),
        "tEXt-without-zero": chunk(b"tEXt", b"k" * 200),
        "tEXt-2-MB": chunk(b"tEXt", b"k\0" + b"v" * (2 << 20)),
        "tEXt-many": chunk(b"tEXt", b"k\0v") * 5000,
        "iCCP-empty": chunk(b"iCCP", b""),
        "iCCP-not-packed": chunk(b"iCCP", b"c\0\0not packed"),
        "iCCP-40-MB": chunk(b"iCCP", b"c\0\0" + zlib.compress(bytes(40 << 20), 1)),
        "pHYs-short": chunk(b"pHYs", b"\1"),
        "tIME-month-99": chunk(b"tIME", b"\xff" * 7),
        "tRNS-short": chunk(b"tRNS", b"\0"),
        "tRNS-long": chunk(b"tRNS", bytes(600)),
        "bKGD-long": chunk(b"bKGD", bytes(600)),
        "sBIT-long": chunk(b"sBIT", bytes(600)),
        "suggested-palette": chunk(b"PLTE", scenes.palette(9).tobytes()),
    }
    for name, chunks in broken.items():
        yield _case(f"metadata-broken/{name}", RGB, 8, before=chunks)
    yield _case("end/none", RGB, 8, end=b"")
    yield _case("end/cut", RGB, 8, end=chunk(b"IEND", b"")[:6])
    yield _case("end/checksum", RGB, 8, end=chunk(b"IEND", b"", checksum=1))
    yield _case("end/behind", RGB, 8, end=chunk(b"IEND", b"") + b"and more" * 999)
    yield _case("end/text-cut", RGB, 8, after=chunk(b"tEXt", bytes(99))[:50], end=b"")
    yield _case("end/none-grey-16", GREY, 16, end=b"")
    yield _case("end/none-adam7", RGBA, 8, Style(interlaced=True), end=b"")


# --- animations -----------------------------------------------------------------------------------


def _fctl(number: int, width: int, height: int, left: int = 0, top: int = 0) -> bytes:
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, left, top, 1, 10, 0, 0))


def _animations() -> Iterator[Case]:
    size = (scenes.WIDTH, scenes.HEIGHT)
    other = zlib.compress(rows(scenes.noise(3, 8, seed=9), 8))
    first = chunk(b"acTL", struct.pack(">II", 2, 0)) + _fctl(0, *size)
    second = _fctl(1, *size) + chunk(b"fdAT", struct.pack(">I", 2) + other)
    animations: dict[str, tuple[bytes, bytes]] = {
        "sound": (first, second),
        "once": (chunk(b"acTL", struct.pack(">II", 1, 1)) + _fctl(0, *size), b""),
        "of-0-frames": (chunk(b"acTL", bytes(8)) + _fctl(0, *size), b""),
        "of-a-million-frames": (
            chunk(b"acTL", struct.pack(">II", 10**6, 0)) + _fctl(0, *size),
            b"",
        ),
        "frames-lacking": (first, b""),
        "second-frame-cut": (first, _fctl(1, *size) + chunk(b"fdAT", b"\0\0\0\2" + other[:50])),
        "second-frame-outside": (first, _fctl(1, *size, 30, 30) + second[38:]),
        "numbers-wrong": (first, _fctl(7, *size) + chunk(b"fdAT", b"\0\0\0\0" + other)),
        "actl-short": (chunk(b"acTL", b"\0"), b""),
        "fctl-short": (chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", b"\0"), b""),
        "fctl-without-actl": (_fctl(0, *size), second),
        "actl-checksum": (chunk(b"acTL", struct.pack(">II", 2, 0), checksum=1), second),
        "fdat-checksum": (first, _fctl(1, *size) + chunk(b"fdAT", b"\0\0\0\2" + other, checksum=1)),
    }
    for name, (before, after) in animations.items():
        yield _case(f"apng/{name}", RGB, 8, before=before, after=after)


def _damaged_pixels() -> Iterator[Case]:
    samples = scenes.noise(3, 8)
    raw, sound = rows(samples, 8), png(samples, 8, RGB)
    size, end = (scenes.WIDTH, scenes.HEIGHT), chunk(b"IEND", b"")
    smooth = png(scenes.smooth(), 8, RGB)
    packed = zlib.compress(raw)
    head = SIGNATURE + header(*size, 8, RGB)
    broken: dict[str, bytes] = {
        **{f"cut-at-{p}-percent": sound[: len(sound) * p // 100] for p in (10, 30, 60, 90, 98)},
        "rows-lacking": head + idat(raw[:-500]) + end,
        "one-row-lacking": head + idat(raw[:-112]) + end,
        "no-rows": head + end,
        "rows-empty": head + chunk(b"IDAT", b"") + end,
        "rows-not-packed": head + chunk(b"IDAT", raw) + end,
        "rows-of-no-filter": head + idat(b"\x09" + raw[1:]) + end,
        "rows-zero-filled": smooth[: len(smooth) // 2] + bytes(len(smooth) // 2),
        "header-checksum": SIGNATURE
        + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0), checksum=1)
        + idat(raw) + end,
        "header-short": SIGNATURE + chunk(b"IHDR", bytes(5)) + idat(raw) + end,
        "header-lacking": SIGNATURE + idat(raw) + end,
        "width-0": SIGNATURE + header(0, 20, 8, RGB) + idat(raw) + end,
        "bits-3": SIGNATURE + header(*size, 3, GREY) + idat(raw) + end,
        "bits-4-of-rgb": SIGNATURE + header(*size, 4, RGB) + idat(raw) + end,
        "type-5": SIGNATURE + header(*size, 8, 5) + idat(raw) + end,
        "palette-lacking": SIGNATURE + header(*size, 8, INDEXED) + idat(raw) + end,
        "signature-alone": SIGNATURE,
        "signature-and-zeros": SIGNATURE + bytes(500),
        "interlaced-cut": png(samples, 8, RGB, Style(interlaced=True))[:-700],
    }  # fmt: skip
    for name, data in broken.items():
        yield refusal(f"png/broken/{name}", data, "broken")
    # All pixels are there: whoever shows them is right, and so is who trusts no checksum less.
    for name, body in (
        ("rows-checksum", chunk(b"IDAT", packed, checksum=1)),
        ("rows-adler", chunk(b"IDAT", packed[:-4] + b"abcd")),
        ("rows-without-adler", chunk(b"IDAT", packed[:-4])),
    ):
        made = Made(head + body + end, scenes.rgb(samples))
        yield Case(f"png/broken/{name}", lambda m=made: m, may_refuse=("broken",))
    for name, side in (("1x1", (1, 1)), ("15x40", (15, 40)), ("40x15", (40, 15))):
        small = scenes.noise(3, 8, width=side[0], height=side[1])
        yield refusal(f"png/small/{name}", png(small, 8, RGB), "small")
