"""HEIC by heif-enc and AVIF by avifenc, in their containers and in those that phones write."""

from collections.abc import Iterator
from functools import cache
from itertools import chain

import numpy as np

from pictures import exif, profiles, scenes
from pictures import heif_boxes as heif
from pictures.case import Array, Case, Made, Within, refusal
from pictures.heif_boxes import Item
from pictures.tools import as_png, run

LOSSY = Within(30, 4)
THROUGH = Within(60, 5)
SIDE = 64
"""Of a tile."""


def cases() -> Iterator[Case]:
    """All cases of both formats."""
    return chain(_heic_encoder(), _avif_encoder(), _containers(), _broken())


@cache
def heic(*flags: str, bits: int = 8, channels: int = 3) -> bytes:
    """The smooth picture by heif-enc."""
    samples = _samples(channels) * (1 if bits == 8 else 257)
    return run("heif-enc", *flags, "i.png", "-o", "o.heic", out="o.heic",
               i_png=as_png(samples, 8 if bits == 8 else 16))  # fmt: skip


@cache
def avif(*flags: str, channels: int = 3, bits: int = 8) -> bytes:
    """The smooth picture by avifenc."""
    samples = _samples(channels) * (1 if bits == 8 else 257)
    return run("avifenc", "-s", "9", "--min", "0", "--max", "8", *flags, "i.png", "o.avif",
               out="o.avif", i_png=as_png(samples, 8 if bits == 8 else 16))  # fmt: skip


def _samples(channels: int) -> Array:
    picture = scenes.smooth().astype(np.int64)
    if channels == 1:
        return scenes.grey_smooth().astype(np.int64)
    if channels == 4:
        return np.concatenate([picture, scenes.smooth_alpha()[..., None]], -1)
    return picture


def _blended() -> Array:
    return scenes.on_white(scenes.smooth().astype(float), scenes.smooth_alpha() / 255)


def _heic_encoder() -> Iterator[Case]:
    ways: dict[str, tuple[tuple[str, ...], int, int, Within]] = {
        "420": (("-q", "95"), 8, 3, LOSSY),
        "444": (("-q", "95", "-p", "chroma=444"), 8, 3, Within(14, 3)),
        "422": (("-q", "95", "-p", "chroma=422"), 8, 3, LOSSY),
        "lossless-rgb": (
            ("-L", "-p", "chroma=444", "--matrix_coefficients=0"), 8, 3, Within(1, 0.5)),
        "limited": (("-q", "95", "--full_range_flag=0"), 8, 3, LOSSY),
        "bt709": (("-q", "95", "--matrix_coefficients=1"), 8, 3, LOSSY),
        "10-bits": (("-q", "95", "-b", "10"), 16, 3, LOSSY),
        "12-bits": (("-q", "95", "-b", "12"), 16, 3, LOSSY),
        "alpha": (("-q", "95"), 8, 4, LOSSY),
        "alpha-10-bits": (("-q", "95", "-b", "10"), 16, 4, LOSSY),
        "alpha-not-kept": (("-q", "95", "--no-alpha"), 8, 4, LOSSY),
        "grey": (("-q", "95"), 8, 1, LOSSY),
        "thumbnail": (("-q", "95", "-t", "32"), 8, 3, LOSSY),
    }  # fmt: skip
    for name, (flags, bits, channels, within) in ways.items():
        yield Case(
            f"heic/heif-enc/{name}",
            lambda f=flags, b=bits, n=channels, w=within: Made(
                heic(*f, bits=b, channels=n),
                scenes.rgb(scenes.grey_smooth()) if n == 1
                else _blended() if n == 4 and "--no-alpha" not in f else scenes.smooth(),
                w,
            ),
        )  # fmt: skip


def _avif_encoder() -> Iterator[Case]:
    for yuv in ("444", "422", "420"):
        for depth in ("8", "10", "12"):
            flags = ("-y", yuv, "-d", depth)
            yield Case(
                f"avif/avifenc/{yuv}-{depth}",
                lambda f=flags: Made(avif(*f), scenes.smooth(), LOSSY, second="vips"),
            )
    ways: dict[str, tuple[tuple[str, ...], int]] = {
        "lossless": (("-l",), 3),
        "limited": (("-r", "l"), 3),
        "grey": (("-y", "400"), 1),
        "alpha": ((), 4),
        "alpha-10": (("-d", "10"), 4),
        "premultiplied": (("-p",), 4),
        "tiles": (("--tilerowslog2", "1", "--tilecolslog2", "1"), 3),
        "bt601": (("--nclx", "1/13/6"), 3),
        "bt709-matrix": (("--nclx", "1/13/1"), 3),
        "rav1e": (("-c", "rav1e"), 3),
    }
    for name, (flags, channels) in ways.items():
        within = Within(1, 0.1) if name == "lossless" else LOSSY
        yield Case(
            f"avif/avifenc/{name}",
            lambda f=flags, n=channels, w=within: Made(
                avif(*f, channels=n),
                {1: scenes.rgb(scenes.grey_smooth()), 4: _blended()}.get(n, scenes.smooth()),
                w,
            ),
        )
    for quarters in range(4):
        for axis in (None, 0, 1):
            flags = ("--irot", str(quarters)) + (() if axis is None else ("--imir", str(axis)))
            yield Case(
                f"avif/turned/{quarters}-{axis}",
                lambda f=flags, q=quarters, a=axis: Made(avif(*f), _moved(q, a), LOSSY),
            )
    yield Case(
        "avif/nclx/display-p3", lambda: _told(avif("--nclx", "12/13/6"), profiles.DISPLAY_P3)
    )


def _told(data: bytes, colours: profiles.Colours, picture: Array | None = None) -> Made:
    picture = scenes.smooth() if picture is None else picture
    expected = scenes.rgb(profiles.shown(picture.astype(float), colours))
    return Made(data, expected, THROUGH)


def _moved(quarters: int, axis: int | None, picture: Array | None = None) -> Array:
    """A turn against the clock, and then a mirror: in this order (ISO/IEC 23000-22, 7.3.6.7)."""
    turned = np.rot90(scenes.smooth() if picture is None else picture, quarters)
    if axis is not None:
        turned = turned[::-1] if axis == 0 else turned[:, ::-1]
    return np.ascontiguousarray(turned)


# --- containers by hand ---------------------------------------------------------------------------


def _picture(family: str, *more: bytes, config: bytes, data: bytes, refers: bytes = b"",
             to: tuple[int, ...] = (), size: tuple[int, int] = (SIDE, SIDE)) -> Item:  # fmt: skip
    kind = b"hvc1" if family == "heic" else b"av01"
    return Item(kind, data, (config, heif.ispe(*size), *more), refers, to)


@cache
def _coded(family: str, tile: int = -1) -> tuple[bytes, bytes]:
    """The smooth picture, or a tile of 64 by 64 of the large one."""
    picture = _square() if tile < 0 else _tile(tile)
    if family == "heic":
        data = run("heif-enc", "-q", "95", "--no-alpha", "i.png", "-o", "o.heic", out="o.heic",
                   i_png=as_png(picture))  # fmt: skip
    else:
        data = run("avifenc", "-s", "9", "-y", "420", "--min", "0", "--max", "8", "i.png",
                   "o.avif", out="o.avif", i_png=as_png(picture))  # fmt: skip
    return heif.coded(data)


def _square() -> Array:
    """x265 codes whole blocks: a picture that is one needs no cutting."""
    return scenes.smooth(SIDE, SIDE)


def _tile(number: int) -> Array:
    top, left = divmod(number, 3)
    whole = scenes.smooth(3 * SIDE, 2 * SIDE)
    return whole[top * SIDE : (top + 1) * SIDE, left * SIDE : (left + 1) * SIDE]


NCLX = heif.nclx(1, 13, 6)


def _single(family: str, *more: bytes, extra: tuple[Item, ...] = ()) -> bytes:
    config, data = _coded(family)
    first = _picture(family, heif.pixi(), *more, config=config, data=data)
    brand = b"heic" if family == "heic" else b"avif"
    return heif.container([first, *extra], brand=brand)


def _grid(family: str, size: tuple[int, int], *more: bytes) -> bytes:
    tiles = [_coded(family, number) for number in range(6)]
    brand = b"heic" if family == "heic" else b"avif"
    whole = Item(
        b"grid", heif.grid(3, 2, *size), (heif.ispe(*size), heif.pixi(), *more),
        b"dimg", tuple(range(2, 8)),
    )  # fmt: skip
    parts = [
        _picture(family, NCLX, config=config, data=data, size=(SIDE, SIDE))
        for config, data in tiles
    ]
    return heif.container([whole, *parts], brand=brand)


def _exif_item(block: bytes) -> Item:
    return Item(b"Exif", bytes(4) + block, (), b"cdsc", (1,))


def _containers() -> Iterator[Case]:
    for family in ("heic", "avif"):
        yield Case(
            f"{family}/boxes/single",
            lambda f=family: Made(_single(f, NCLX), _square(), LOSSY, second="vips"),
        )
        for quarters in range(4):
            for axis in (None, 0, 1):
                turns = (heif.irot(quarters),) + (() if axis is None else (heif.imir(axis),))
                yield Case(
                    f"{family}/boxes/turned-{quarters}-{axis}",
                    lambda f=family, t=turns, q=quarters, a=axis: Made(
                        _single(f, NCLX, *t), _moved(q, a, _square()), LOSSY
                    ),
                )
        for turn in range(1, 9):  # HEIF, 7.1: only irot and imir turn a picture
            yield Case(
                f"{family}/exif/{turn}-is-not-heeded",
                lambda f=family, t=turn: Made(
                    _single(f, NCLX, extra=(_exif_item(exif.exif(t)),)), _square(), LOSSY
                ),
            )
        for name, block in exif.damaged().items():
            yield Case(
                f"{family}/exif-broken/{name}",
                lambda f=family, b=block: Made(
                    _single(f, NCLX, extra=(_exif_item(b),)), _square(), LOSSY
                ),
            )
        for space, colours in profiles.SPACES.items():
            icc = profiles.rgb_profile(colours, 4)
            yield Case(
                f"{family}/icc/{space}",
                lambda f=family, c=colours, i=icc: _told(
                    _single(f, heif.prof(i), NCLX), c, _square()
                ),
            )
        for name, icc in profiles.damaged().items():
            if not icc:  # no bytes: libavif takes the box for broken
                continue
            yield Case(
                f"{family}/icc-broken/{name}",
                lambda f=family, i=icc: Made(_single(f, heif.prof(i), NCLX), _square(), LOSSY),
            )
        yield Case(
            f"{family}/nclx/display-p3-by-hand",
            lambda f=family: _told(
                _single(f, heif.nclx(12, 13, 6)), profiles.DISPLAY_P3, _square()
            ),
        )
        for size in ((192, 128), (180, 100)):
            expected = scenes.smooth(192, 128)[: size[1], : size[0]]
            name = f"{family}/grid/{size[0]}x{size[1]}"
            yield Case(name, lambda f=family, s=size, e=expected: Made(_grid(f, s, NCLX), e, LOSSY))
            yield Case(
                f"{name}-turned",
                lambda f=family, s=size, e=expected: Made(
                    _grid(f, s, NCLX, heif.irot(3)), scenes.upright(e, 6), LOSSY
                ),
            )
        yield Case(f"{family}/grid/display-p3", lambda f=family: _phone(f))


def _phone(family: str) -> Made:
    """As a phone has it: a grid with a profile of Display P3, turned."""
    icc = heif.prof(profiles.rgb_profile(profiles.DISPLAY_P3, 4))
    levels = profiles.shown(scenes.smooth(192, 128).astype(float), profiles.DISPLAY_P3)
    data = _grid(family, (192, 128), icc, heif.irot(3))
    return Made(data, scenes.upright(scenes.rgb(levels), 6), THROUGH)


def _broken() -> Iterator[Case]:
    for family in ("heic", "avif"):
        for percent in (5, 50, 95):
            yield refusal(
                f"{family}/broken/cut-at-{percent}-percent",
                lambda f=family, p=percent: (d := _single(f, NCLX))[: len(d) * p // 100],
                "broken",
            )
        ways = {
            "no-items": lambda f: heif.container([], brand=b"heic" if f == "heic" else b"avif"),
            "zeros-as-pixels": lambda f: (d := _single(f, NCLX))[: d.index(b"mdat") + 4]
            + bytes(len(d) - d.index(b"mdat") - 4),
            "meta-lacks": lambda f: _single(f, NCLX).replace(b"meta", b"free", 1),
            "ispe-huge": lambda f: _single(f, NCLX).replace(
                heif.ispe(SIDE, SIDE), heif.ispe(2**31, 2**31)),
            "primary-lacks": lambda f: heif.container(
                [_picture(f, config=_coded(f)[0], data=_coded(f)[1])], 9,
                b"heic" if f == "heic" else b"avif"),
        }  # fmt: skip
        for name, make in ways.items():
            reasons = (
                ("broken", "pixels", "memory", "small") if name == "ispe-huge" else ("broken",)
            )
            yield refusal(f"{family}/broken/{name}", lambda m=make, f=family: m(f), *reasons)
