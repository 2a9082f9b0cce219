"""TIFF by hand and by tiffcp: orders, strips, tiles, planes, compressions, depths, colours."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from pictures import profiles, scenes
from pictures.case import (
    BLENDED,
    CONVERTED,
    EXACT,
    LOSSY,
    ROUNDED,
    Array,
    Case,
    Made,
    Within,
    refusal,
)
from pictures.tiff_writer import (
    BLACK_IS_ZERO,
    CIELAB,
    CMYK,
    PALETTE,
    RGB,
    WHITE_IS_ZERO,
    Layout,
    pages,
    tiff,
)
from pictures.tools import run

UNUSUAL = ("broken", "format")
COMPRESSIONS = {"none": 1, "lzw": 5, "deflate": 8, "packbits": 32773, "old-deflate": 32946}


def cases() -> Iterator[Case]:
    """All cases of this format."""
    return chain(
        _layouts(), _compressions(), _depths(), _alphas(), _inks(), _tools(), _around(), _broken()
    )


def _rgb(layout: Layout, bits: int = 8, second: str = "vips") -> Made:
    samples = scenes.noise(3, bits)
    expected = scenes.rgb(scenes.eight(samples, bits))
    within = EXACT if bits == 8 else ROUNDED
    return Made(tiff(samples, bits, RGB, layout), expected, within, second=second)


def _layouts() -> Iterator[Case]:
    for order in "<>":
        for big in (False, True):
            for tile in (0, 16):
                for planar in (False, True):
                    layout = Layout(order=order, big=big, tile=tile, planar=planar)
                    name = f"{'II' if order == '<' else 'MM'}{'-big' if big else ''}"
                    name += f"{'-tiles' if tile else ''}{'-planes' if planar else ''}"
                    yield Case(
                        f"tiff/layout/{name}",
                        # libvips has no tiles in planes.
                        lambda x=layout: _rgb(x, second="" if x.tile and x.planar else "vips"),
                        may_refuse=UNUSUAL if planar or (big and order == ">") else (),
                    )
    for strip in (1, 26, 1000):
        yield Case(f"tiff/strips-of-{strip}", lambda n=strip: _rgb(Layout(strip=n)))


def _compressions() -> Iterator[Case]:
    for compression, code in COMPRESSIONS.items():
        for predictor in (1, 2):
            if code in (1, 32773) and predictor == 2:
                continue
            for bits in (8, 16):
                for order in "<>":
                    layout = Layout(order=order, compression=code, predictor=predictor)
                    name = f"{compression}-{predictor}-{bits}-{'II' if order == '<' else 'MM'}"
                    yield Case(f"tiff/compression/{name}", lambda x=layout, b=bits: _rgb(x, b))


def _depths() -> Iterator[Case]:
    for bits in (1, 2, 4, 8, 16):
        for photometric, name in ((BLACK_IS_ZERO, "black"), (WHITE_IS_ZERO, "white")):
            for order in "<>":
                for compression in (1, 5):
                    layout = Layout(order=order, compression=compression)
                    yield Case(
                        f"tiff/grey/{name}-is-0-{bits}-{'II' if order == '<' else 'MM'}"
                        f"-{'lzw' if compression == 5 else 'none'}",
                        lambda b=bits, p=photometric, x=layout: _grey(b, p, x),
                        may_refuse=UNUSUAL if bits == 16 and name == "white" else (),
                    )
    for bits in (1, 2, 4, 8):
        for order in "<>":
            yield Case(
                f"tiff/palette/{bits}-{'II' if order == '<' else 'MM'}",
                lambda b=bits, o=order: _indexed(b, o),
            )
    for bits in (1, 8):
        yield Case(
            f"tiff/grey/fill-order-2-{bits}",
            lambda b=bits: _grey(b, BLACK_IS_ZERO, Layout(fill_order=2)),
            may_refuse=UNUSUAL,
        )
    yield Case("tiff/rgb/16", lambda: _rgb(Layout(), 16))
    for bits in (32, 64):
        for top, word in ((1.0, "to-1"),):
            yield Case(
                f"tiff/float/grey-{bits}-{word}", lambda b=bits, t=top: _floats(b, t, 1),
                may_refuse=UNUSUAL,
            )  # fmt: skip
    yield Case("tiff/float/rgb-32", lambda: _floats(32, 1.0, 3), may_refuse=UNUSUAL)
    yield Case("tiff/rgb/32", lambda: _rgb(Layout(), 32, second=""), may_refuse=UNUSUAL)


def _grey(bits: int, photometric: int, layout: Layout) -> Made:
    samples = scenes.noise(1, bits)
    shown = samples if photometric == BLACK_IS_ZERO else 2**bits - 1 - samples
    expected = scenes.rgb(scenes.eight(shown, bits))
    within = ROUNDED if bits == 16 else EXACT
    # libvips has its own way with 16 bits whose white is 0.
    second = "" if bits == 16 and photometric == WHITE_IS_ZERO else "vips"
    return Made(tiff(samples, bits, photometric, layout), expected, within, second=second)


def _indexed(bits: int, order: str) -> Made:
    samples, palette = scenes.noise(1, bits), scenes.palette(2**bits)
    table = (palette.astype(int) * 257).T.ravel().tolist()
    layout = Layout(order=order, tags={320: (3, table)})
    return Made(tiff(samples, bits, PALETTE, layout), palette[samples[..., 0]], second="vips")


def _floats(bits: int, top: float, channels: int) -> Made:
    samples = scenes.noise(channels, 8) / 255 * top
    data = tiff(
        samples.astype(np.float64), bits, RGB if channels == 3 else BLACK_IS_ZERO, Layout(),
        sample_format=3,
    )  # fmt: skip
    return Made(data, scenes.rgb(samples / top * 255), ROUNDED)


def _alphas() -> Iterator[Case]:
    for bits in (8, 16):
        for kind, name in ((2, "straight"), (1, "premultiplied"), (0, "unspecified")):
            for channels in (4, 2):
                yield Case(
                    f"tiff/alpha/{name}-{bits}-of-{channels}",
                    lambda b=bits, k=kind, n=channels: _alpha(b, k, n),
                    # What a channel that is not said to be alpha means, nobody knows.
                    may_refuse=() if kind and channels == 4 else UNUSUAL,
                )


def _alpha(bits: int, kind: int, channels: int) -> Made:
    levels = scenes.eight(scenes.noise(channels, bits), bits)
    colours, alpha = levels[..., :-1], levels[..., -1] / 255
    expected = scenes.on_white(colours, alpha) if kind else scenes.rgb(colours)
    stored = colours * alpha[..., None] if kind == 1 else colours
    whole = np.concatenate([stored, levels[..., -1:]], -1) / 255 * (2**bits - 1)
    data = tiff(
        whole.round().astype(np.int64), bits, RGB if channels == 4 else BLACK_IS_ZERO, Layout(),
        extra=(kind,),
    )  # fmt: skip
    return Made(data, expected, Within(3, 1) if kind == 1 else BLENDED)


def _icc(icc: bytes, **options: object) -> Layout:
    return Layout(tags={34675: (7, list(icc))}, **options)


def _inks() -> Iterator[Case]:
    ink = profiles.table_profile(b"CMYK", profiles.press_lab)
    plates = scenes.noise(4, 8)

    def naive() -> Array:
        share = plates / 255
        return scenes.rgb(255 * (1 - share[..., :3]) * (1 - share[..., 3:]))

    yield Case("tiff/cmyk/8", lambda: Made(tiff(plates, 8, CMYK, Layout()), naive(), Within(2, 1)))
    yield Case(
        "tiff/cmyk/8-icc",
        lambda: Made(
            tiff(plates, 8, CMYK, _icc(ink)),
            scenes.rgb(profiles.by_littlecms(plates, ink, "CMYK")),
            CONVERTED,
            second="vips",
            second_within=Within(6, 1),
        ),
    )
    yield Case(
        "tiff/cmyk/16",
        lambda: Made(tiff(plates * 257, 16, CMYK, Layout()), naive(), Within(3, 1)),
        may_refuse=UNUSUAL,
    )
    yield Case("tiff/lab/8", _lab, may_refuse=UNUSUAL)
    for space, colours in profiles.SPACES.items():
        for version in (2, 4):
            yield Case(
                f"tiff/icc/{space}-v{version}",
                lambda c=colours, v=version: _with_profile(c, v, 8),
            )
        yield Case(f"tiff/icc/{space}-16", lambda c=colours: _with_profile(c, 4, 16))
    for name, icc in profiles.damaged().items():
        if icc:
            yield Case(f"tiff/icc-broken/{name}", lambda i=icc: _rgb(_icc(i), second=""))
    for gamma in (1.8, 2.2):
        yield Case(f"tiff/icc/grey-{gamma}", lambda g=gamma: _with_grey_profile(g))


def _with_profile(colours: profiles.Colours, version: int, bits: int) -> Made:
    samples = scenes.noise(3, bits)
    data = tiff(samples, bits, RGB, _icc(profiles.rgb_profile(colours, version)))
    expected = scenes.rgb(profiles.shown(scenes.eight(samples, bits), colours))
    within = CONVERTED if bits == 8 else Within(14, 1)
    second = "vips" if bits == 8 else ""
    return Made(data, expected, within, second=second, second_within=Within(4, 1))


def _with_grey_profile(gamma: float) -> Made:
    samples = scenes.noise(1, 8)
    data = tiff(samples, 8, BLACK_IS_ZERO, _icc(profiles.grey_profile(gamma)))
    levels = profiles.srgb_levels(profiles.linear(samples.astype(float), gamma))
    return Made(data, scenes.rgb(levels), CONVERTED)


def _lab() -> Made:
    """L* to 255, a* and b* as signed bytes (TIFF 6.0, section 23), seen from D50."""
    grid = scenes.smooth().astype(float)
    lab = np.stack([30 + grid[..., 0] / 4, grid[..., 1] / 8 - 15, grid[..., 2] / 8 - 15], -1)
    stored = np.stack(
        [lab[..., 0] * 2.55, np.round(lab[..., 1]) % 256, np.round(lab[..., 2]) % 256], -1
    )
    f = (lab[..., 0] + 16) / 116
    xyz = np.stack([f + np.round(lab[..., 1]) / 500, f, f - np.round(lab[..., 2]) / 200], -1)
    xyz = np.where(xyz > 6 / 29, xyz**3, (xyz - 4 / 29) * 3 * (6 / 29) ** 2) * profiles.D50
    light = xyz @ np.linalg.inv(profiles.to_xyz(profiles.SRGB)).T
    data = tiff(stored.round().astype(np.int64), 8, CIELAB, Layout())
    return Made(data, scenes.rgb(profiles.srgb_levels(light)), Within(6, 2))


def _tools() -> Iterator[Case]:
    for name, flags in {
        "jpeg": ("-c", "jpeg:97"), "jpeg-rgb": ("-c", "jpeg:97:r"), "zstd": ("-c", "zstd"),
        "lzw-tiles": ("-c", "lzw:2", "-t", "-w", "16", "-l", "16"), "lzma": ("-c", "lzma"),
        "planes": ("-p", "separate", "-c", "zip"), "big": ("-8", "-c", "lzw"),
    }.items():  # fmt: skip
        yield Case(f"tiff/tiffcp/{name}", lambda f=flags: _copied(f), may_refuse=UNUSUAL)
    for name in ("g3", "g3:2d", "g4"):
        yield Case(f"tiff/tiffcp/{name.replace(':', '-')}", lambda n=name: _fax(n))
    for name in ("LZW", "Zip", "RLE", "JPEG"):
        yield Case(f"tiff/imagemagick/{name.lower()}", lambda n=name: _magick(n))


def _copied(flags: tuple[str, ...]) -> Made:
    picture = scenes.smooth()
    source = tiff(picture.astype(np.int64), 8, RGB, Layout(strip=16))
    data = run("tiffcp", *flags, "i.tif", "o.tif", out="o.tif", i_tif=source)
    within = Within(30, 4) if "jpeg:97" in flags else LOSSY if "jpeg:97:r" in flags else EXACT
    return Made(data, picture, within)


def _fax(compression: str) -> Made:
    samples = (scenes.noise(1, 8) > 120).astype(np.int64)
    source = tiff(samples, 1, WHITE_IS_ZERO, Layout())
    data = run("tiffcp", "-c", compression, "i.tif", "o.tif", out="o.tif", i_tif=source)
    return Made(data, scenes.rgb(255.0 * (1 - samples)), second="vips")


def _magick(compression: str) -> Made:
    picture = scenes.smooth()
    source = tiff(picture.astype(np.int64), 8, RGB, Layout())
    data = run("convert", "i.tif", "-compress", compression, "-quality", "97", "o.tif",
               out="o.tif", i_tif=source)  # fmt: skip
    return Made(data, picture, Within(30, 4) if compression == "JPEG" else EXACT, second="vips")


def _around() -> Iterator[Case]:
    for turn in range(1, 9):
        for order in "<>":
            layout = Layout(order=order, tags={274: (3, [turn])})
            name = f"tiff/orientation/{turn}-{'II' if order == '<' else 'MM'}"
            yield Case(name, lambda x=layout, t=turn: _turned(x, t))
        tiled = Layout(tile=16, compression=8, tags={274: (3, [turn])})
        yield Case(f"tiff/orientation/{turn}-tiles", lambda x=tiled, t=turn: _turned(x, t))
    tags: dict[str, dict[int, tuple[int, list[int]]]] = {
        "orientation-0": {274: (3, [0])},
        "orientation-9": {274: (3, [9])},
        "exif-far": {34665: (4, [0x7FFFFFFF])},
        "gps-loop": {34853: (4, [8])},
        "xmp-broken": {700: (7, list(b"<<<<\xff"))},
        "photoshop-broken": {34377: (7, list(b"8BIM\xff\xff\xff\xff"))},
        "private": {65000: (7, list(range(256)))},
        "resolution-none": {296: (3, [9])},
        "software-empty": {305: (7, [])},
        "sub-pages-far": {330: (4, [0x7FFFFFF0])},
        "text-of-1-MB": {270: (7, [65] * (1 << 20))},
    }
    for name, more in tags.items():
        yield Case(f"tiff/metadata/{name}", lambda m=more: _rgb(Layout(tags=m), second=""))
    yield Case("tiff/metadata/behind", lambda: _behind(b"and more" * 99))
    yield Case("tiff/pages/two", lambda: _pages(broken=False))
    yield Case("tiff/pages/second-broken", lambda: _pages(broken=True))
    yield Case("tiff/pages/next-far", _next_far)


def _turned(layout: Layout, turn: int) -> Made:
    made = _rgb(layout)
    assert made.expected is not None
    return replace(made, expected=scenes.upright(made.expected, turn))


def _behind(extra: bytes) -> Made:
    made = _rgb(Layout(), second="")
    return replace(made, data=made.data + extra)


def _page(samples: Array) -> tuple[dict[int, tuple[int, list[int]]], list[bytes], int, int]:
    height, width, channels = samples.shape
    tags = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [8] * channels), 259: (3, [1]),
        262: (3, [RGB]), 277: (3, [channels]), 278: (4, [height]),
    }  # fmt: skip
    return tags, [samples.astype(np.uint8).tobytes()], 273, 279


def _pages(broken: bool) -> Made:
    first, second = scenes.noise(3, 8), scenes.noise(3, 8, seed=2)
    data = pages([_page(first), _page(second)], Layout())
    return Made(data[:-900] if broken else data, scenes.rgb(first))


def _next_far() -> Made:
    first = scenes.noise(3, 8)
    data = bytearray(pages([_page(first)], Layout()))
    count = struct.unpack_from("<H", data, 8)[0]
    struct.pack_into("<I", data, 10 + 12 * count, 0x7FFFFFF0)
    return Made(bytes(data), scenes.rgb(first))


def _broken() -> Iterator[Case]:
    samples = scenes.noise(3, 8)
    for name, code in COMPRESSIONS.items():
        data = tiff(samples, 8, RGB, Layout(compression=code))
        for percent in (3, 40, 95):
            cut = data[: len(data) * percent // 100]
            yield refusal(f"tiff/broken/{name}-cut-at-{percent}-percent", cut, "broken")
    wrong: dict[str, dict[int, tuple[int, list[int]]]] = {
        "width-0": {256: (4, [0])},
        "compression-99": {259: (3, [99])},
        "photometric-99": {262: (3, [99])},
        "bits-7": {258: (3, [7, 7, 7])},
        "bits-uneven": {258: (3, [8, 16, 8])},
        "no-samples": {277: (3, [0])},
    }
    for name, tags in wrong.items():
        data = tiff(samples, 8, RGB, Layout(tags=tags))
        yield refusal(f"tiff/broken/{name}", data, "broken")
    ends = {
        "header-alone": b"II*\0\x08\0\0\0",
        "directory-far": b"II*\0\xff\xff\xff\x7f" + bytes(99),
        "directory-empty": b"II*\0\x08\0\0\0\0\0\0\0\0\0",
        "deflate-garbage": tiff(samples, 8, RGB, Layout(compression=8)).replace(b"\x78\x9c", b"zz"),
    }
    for name, data in ends.items():
        yield refusal(f"tiff/broken/{name}", data, "broken", "format")
