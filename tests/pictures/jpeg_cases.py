"""JPEG by three encoders, with what cameras and editors put around it, sound and damaged."""

import io
import struct
from collections.abc import Iterator
from functools import cache
from itertools import chain

import numpy as np
from PIL import Image

from pictures import exif, profiles, scenes
from pictures.case import CONVERTED, LOSSY, Array, Case, Made, Within, refusal
from pictures.tools import as_png, as_pnm, run

SUBSAMPLED = Within(30, 4)
"""Chroma of fewer pixels: off at the edges of the picture."""
THROUGH = Within(35, 4)
"""With loss, and then through a profile, which makes dark levels differ more."""
BLACK_PLATE = 90


@cache
def plain(quality: int = 97, subsampling: int = 0, **options: object) -> bytes:
    """The smooth picture by Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(scenes.smooth()).save(
        buffer, "JPEG", quality=quality, subsampling=subsampling, **options
    )
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    """A marker segment with its length."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def inserted(data: bytes, *segments: bytes) -> bytes:
    """``segments`` right behind the start of the file."""
    return data[:2] + b"".join(segments) + data[2:]


def _bare(data: bytes) -> bytes:
    """Without the segments APP0 to APP15 at the front."""
    at = 2
    while data[at] == 0xFF and 0xE0 <= data[at + 1] <= 0xEF:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[:2] + data[at:]


def cases() -> Iterator[Case]:
    """All cases of this format."""
    return chain(
        _encoders(), _inks(), _orientations(), _profiles(), _metadata(), _several(), _broken()
    )


def _smooth(data: bytes, within: Within = LOSSY, second: str = "vips") -> Made:
    """Whatever the sampling, decoders of one kind differ by little: by how chroma is enlarged."""
    return Made(data, scenes.smooth(), within, second=second)


def _encoders() -> Iterator[Case]:
    for sample in ("1x1", "2x1", "1x2", "2x2", "4x1", "4x2"):
        for way in ("baseline", "progressive", "arithmetic", "optimize", "restart"):
            flags = {"baseline": (), "restart": ("-restart", "3B")}.get(way, (f"-{way}",))
            yield Case(
                f"jpeg/cjpeg/{sample}-{way}",
                lambda s=sample, f=flags: _smooth(
                    run("cjpeg", "-quality", "97", "-sample", s, *f, "-outfile", "o.jpg", "i.ppm",
                        out="o.jpg", i_ppm=as_pnm(scenes.smooth())),
                    LOSSY if s == "1x1" else SUBSAMPLED,
                ),
                # Arithmetic coding is not in every build of a decoder, nor in browsers.
                may_refuse=("broken",) if way == "arithmetic" else (),
            )  # fmt: skip
    for flag in ("-grayscale", "-rgb"):
        yield Case(f"jpeg/cjpeg/{flag[1:]}", lambda f=flag: _cjpeg_kind(f))
    for size in ((16, 16), (17, 31), (100, 16), (257, 19)):
        for subsampling in (0, 2):
            yield Case(
                f"jpeg/sizes/{size[0]}x{size[1]}-{subsampling}",
                lambda s=size, n=subsampling: _sized(s, n),
            )
    for subsampling in (0, 1, 2):
        for progressive in (False, True):
            yield Case(
                f"jpeg/pillow/{subsampling}-{'progressive' if progressive else 'baseline'}",
                lambda n=subsampling, p=progressive: _smooth(
                    plain(subsampling=n, progressive=p), SUBSAMPLED if n else LOSSY
                ),
            )
    for interlace in ("none", "plane", "line"):
        yield Case(
            f"jpeg/imagemagick/{interlace}",
            lambda i=interlace: _smooth(
                run("convert", "i.png", "-quality", "96", "-interlace", i, "o.jpg", out="o.jpg",
                    i_png=as_png(scenes.smooth())),
            ),
        )  # fmt: skip


def _cjpeg_kind(flag: str) -> Made:
    data = run("cjpeg", "-quality", "97", flag, "-outfile", "o.jpg", "i.ppm", out="o.jpg",
               i_ppm=as_pnm(scenes.smooth()))  # fmt: skip
    if flag == "-rgb":
        return _smooth(data)
    luma = scenes.smooth() @ np.array([0.299, 0.587, 0.114])  # JFIF 1.02
    return Made(data, scenes.rgb(luma[..., None]), LOSSY, second="vips")


def _sized(size: tuple[int, int], subsampling: int) -> Made:
    picture = scenes.smooth(*size)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=97, subsampling=subsampling)
    within = SUBSAMPLED if subsampling else LOSSY
    return Made(buffer.getvalue(), picture, within, second="vips")


# --- four inks ------------------------------------------------------------------------------------


def _plates() -> Array:
    picture = scenes.smooth().astype(int)
    black = np.full((*picture.shape[:2], 1), BLACK_PLATE)
    return np.concatenate([picture, black], -1).astype(np.uint8)


@cache
def _four(icc: bytes = b"") -> bytes:
    """As Adobe has it: inverted, with a marker. Chromium takes all CMYK for that, marker or not."""
    flat = _plates()
    image = Image.frombytes("CMYK", (flat.shape[1], flat.shape[0]), flat.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=97, subsampling=0, icc_profile=icc or None)
    return buffer.getvalue()


def _without_adobe(data: bytes) -> bytes:
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def _naive() -> Array:
    """Ink on white without a profile: (1 - c)(1 - k)."""
    plates = _plates().astype(float) / 255
    return scenes.rgb(255 * (1 - plates[..., :3]) * (1 - plates[..., 3:]))


def _inks() -> Iterator[Case]:
    ink = profiles.table_profile(b"CMYK", profiles.press_lab)
    press = lambda: scenes.rgb(profiles.by_littlecms(_plates(), ink, "CMYK"))  # noqa: E731
    yield Case(
        "jpeg/cmyk/adobe-inverted", lambda: Made(_four(), _naive(), THROUGH, second="magick")
    )
    yield Case(
        "jpeg/cmyk/without-marker",
        lambda: Made(_without_adobe(_four()), _naive(), THROUGH),
    )
    yield Case("jpeg/cmyk/adobe-inverted-icc", lambda: Made(_four(ink), press(), THROUGH))
    yield Case(
        "jpeg/cmyk/without-marker-icc",
        lambda: Made(_without_adobe(_four(ink)), press(), THROUGH),
    )
    for name, wrong in (("rgb", profiles.rgb_profile(profiles.SWAPPED)), ("none", b"x" * 300)):
        yield Case(
            f"jpeg/cmyk/profile-of-{name}",
            lambda w=wrong: Made(_four(w), _naive(), THROUGH),
        )
    yield Case("jpeg/cmyk/ycck", lambda: Made(_ycck(), _naive(), THROUGH, second="magick"))
    yield Case("jpeg/cmyk/ycck-icc", lambda: Made(_ycck(ink), press(), THROUGH))


def _ycck(icc: bytes = b"") -> bytes:
    """Transform 2: libjpeg has C = 255 - R, and Adobe's C is inverted, so that R is the ink."""
    plates = _plates().astype(float)
    luma = plates[..., :3] @ np.array([0.299, 0.587, 0.114])
    blue = 128 + (plates[..., 2] - luma) * 0.564
    red = 128 + (plates[..., 0] - luma) * 0.713
    stacked = np.stack([luma, blue, red, 255 - plates[..., 3]], -1)
    # Pillow inverts what it writes as CMYK.
    flat = 255 - stacked.round().clip(0, 255).astype(np.uint8)
    image = Image.frombytes("CMYK", (flat.shape[1], flat.shape[0]), flat.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=97, subsampling=0, icc_profile=icc or None)
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xee")
    data[at + 15] = 2  # Adobe's Technical Note 5116: the transform is its last byte
    return bytes(data)


# --- around ---------------------------------------------------------------------------------------


def app1(block: bytes) -> bytes:
    """EXIF's segment."""
    return segment(0xE1, exif.MARK + block)


def _orientations() -> Iterator[Case]:
    for turn in range(1, 9):
        for order in "<>":
            for kind in (3, 4):
                block = exif.exif(turn, order=order, kind=kind)
                name = f"{turn}-{'II' if order == '<' else 'MM'}"
                # TIFF 6.0 has a SHORT here; browsers take a LONG for none.
                if kind == 3:
                    yield Case(
                        f"jpeg/exif/{name}",
                        lambda b=block, t=turn: _turned(inserted(plain(), app1(b)), t, "vips"),
                    )
        block = exif.exif(turn)
        yield Case(
            f"jpeg/exif/{turn}-without-jfif",
            lambda b=block, t=turn: _turned(inserted(_bare(plain()), app1(b)), t, "vips"),
        )
        yield Case(
            f"jpeg/exif/{turn}-behind-jfif",
            lambda b=block, t=turn: _turned(_behind_jfif(b), t, "vips"),
        )
        yield Case(
            f"jpeg/exif/{turn}-broken-behind",
            lambda t=turn: _turned(
                inserted(plain(), app1(exif.exif(t)[:-4] + b"\xff\xff\xff\x7f")), t
            ),
        )
        yield Case(f"jpeg/exif/{turn}-subsampled", lambda t=turn: _turned_subsampled(t))
    for name, block in exif.damaged().items():
        yield Case(
            f"jpeg/exif-broken/{name}",
            lambda b=block: _smooth(inserted(plain(), app1(b)), second=""),
        )


def _turned(data: bytes, turn: int, second: str = "") -> Made:
    return Made(data, scenes.upright(scenes.smooth(), turn), LOSSY, second=second)


def _turned_subsampled(turn: int) -> Made:
    picture = scenes.smooth(61, 35)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=97, subsampling=2)
    data = inserted(buffer.getvalue(), app1(exif.exif(turn)))
    return Made(data, scenes.upright(picture, turn), SUBSAMPLED, second="vips")


def _behind_jfif(block: bytes) -> bytes:
    data = plain()
    end = 4 + int.from_bytes(data[4:6], "big")
    return data[:end] + app1(block) + data[end:]


def icc_segments(icc: bytes, size: int = 65_000) -> list[bytes]:
    """APP2, numbered, of at most ``size`` bytes each (ICC.1, annex B.4)."""
    parts = [icc[at : at + size] for at in range(0, len(icc), size)]
    return [
        segment(0xE2, b"ICC_PROFILE\0" + bytes([number, len(parts)]) + part)
        for number, part in enumerate(parts, 1)
    ]


def _profiles() -> Iterator[Case]:
    for space, colours in profiles.SPACES.items():
        for version in (2, 4):
            for size in (65_000, 90):
                yield Case(
                    f"jpeg/icc/{space}-v{version}{'-in-parts' if size == 90 else ''}",
                    lambda c=colours, v=version, s=size: _with_profile(
                        profiles.rgb_profile(c, v), c, s
                    ),
                )
    swapped = profiles.SWAPPED
    parts = icc_segments(profiles.rgb_profile(swapped), 90)
    yield Case(
        "jpeg/icc/parts-in-disorder",
        lambda: Made(inserted(plain(), *parts[::-1]), _shown(swapped), THROUGH),
    )
    yield Case(
        "jpeg/icc-broken/a-part-lacks", lambda: _smooth(inserted(plain(), *parts[:-1]), second="")
    )
    yield Case("jpeg/icc-broken/part-0", lambda: _smooth(
        inserted(plain(), segment(0xE2, b"ICC_PROFILE\0\0\0abc")), second=""))  # fmt: skip
    yield Case("jpeg/icc-broken/cut", lambda: _smooth(
        inserted(plain(), segment(0xE2, b"ICC_PROFILE\0")), second=""))  # fmt: skip
    for name, icc in profiles.damaged().items():
        yield Case(
            f"jpeg/icc-broken/{name}",
            lambda i=icc: _smooth(inserted(plain(), *icc_segments(i)), second=""),
        )
    for gamma in (1.8, 2.2):
        yield Case(f"jpeg/icc/grey-{gamma}", lambda g=gamma: _grey(profiles.grey_profile(g), g))
    yield Case(
        "jpeg/icc-broken/grey-with-cmyk",
        lambda: _grey(profiles.table_profile(b"CMYK", profiles.press_lab), None),
    )


def _shown(colours: profiles.Colours) -> Array:
    return scenes.rgb(profiles.shown(scenes.smooth().astype(float), colours))


def _with_profile(icc: bytes, colours: profiles.Colours, size: int) -> Made:
    data = inserted(plain(), *icc_segments(icc, size))
    return Made(data, _shown(colours), THROUGH, second="vips")


def _grey(icc: bytes, gamma: float | None) -> Made:
    picture = scenes.grey_smooth()
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0]).save(buffer, "JPEG", quality=98)
    levels = profiles.srgb_levels(profiles.linear(picture.astype(float), gamma))
    return Made(
        inserted(buffer.getvalue(), *icc_segments(icc)),
        scenes.rgb(levels),
        Within(LOSSY.most, CONVERTED.mean + 1),
    )


def _metadata() -> Iterator[Case]:
    data = plain()
    segments = {
        "comment": segment(0xFE, b"hello"),
        "comment-empty": segment(0xFE, b""),
        "comment-no-text": segment(0xFE, bytes(range(256)) * 9),
        "comments-of-3-MB": segment(0xFE, b"c" * 65_000) * 48,
        "comments-many": segment(0xFE, b"c") * 5000,
        "xmp": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"),
        "xmp-broken": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><<<\xff"),
        "xmp-with-an-orientation": segment(
            0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
        ),
        "photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\2ab"),
        "photoshop-broken": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\0\0\xff\xff\xff"),
        "photoshop-cut": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0"),
        "app0-short": segment(0xE0, b"JF"),
        "app0-jfif-short": segment(0xE0, b"JFIF\0"),
        "app0-jfxx": segment(0xE0, b"JFXX\0\x13\xff\xff"),
        "app3-to-15": b"".join(segment(0xE0 + n, b"any") for n in (3, 4, 5, 10, 12, 15)),
        "app11-c2pa": segment(0xEB, b"JP\0\1\0\0\0\1" + bytes(300)),
        "mpf-broken": segment(0xE2, b"MPF\0II*\0\xff\xff\xff\x7f"),
        "mpf-empty": segment(0xE2, b"MPF\0"),
        "flir": segment(0xE1, b"FLIR\0\1\0\0" + bytes(99)),
        "fill-bytes": b"\xff" * 9 + segment(0xFE, b"x"),
        "app14-short": segment(0xEE, b"Adob"),
    }
    for name, extra in segments.items():
        yield Case(f"jpeg/metadata/{name}", lambda e=extra: _smooth(inserted(data, e), second=""))
    ends = {
        "no-end": data[:-2],
        "half-an-end": data[:-1],
        "behind": data + b"and more" * 99,
        "zeros-behind": data + bytes(9999),
        "a-video-behind": data + b"\0\0\0\x18ftypmp42" + bytes(5000),
        "another-behind": data + plain(quality=40),
        "a-zip-behind": data + b"PK\3\4" + bytes(99),
    }
    for name, whole in ends.items():
        yield Case(f"jpeg/end/{name}", lambda w=whole: _smooth(w, second=""))
    for way in ("progressive", "restart"):
        more = {"progressive": True} if way == "progressive" else {"restart_marker_blocks": 2}
        yield Case(f"jpeg/end/no-end-{way}", lambda m=more: _smooth(plain(**m)[:-2], second=""))
    density = data[:13] + b"\7\0\0\0\0" + data[18:]
    yield Case("jpeg/metadata/density-0", lambda: _smooth(density, second=""))
    thumbnail = data[:18] + b"\xff\xff" + data[20:]
    yield Case("jpeg/metadata/jfif-thumbnail-lacks", lambda: _smooth(thumbnail, second=""))


def _several() -> Iterator[Case]:
    """MPO (CIPA DC-007): the first picture is meant."""
    for others in (1, 3):
        yield Case(f"jpeg/mpo/{others}-behind", lambda n=others: _smooth(_mpo(n)))
    yield Case("jpeg/mpo/second-cut", lambda: _smooth(_mpo(1)[:-300], second=""))
    yield Case("jpeg/mpo/second-lacks", lambda: _smooth(_first_of_mpo(), second=""))


def _mpo(others: int) -> bytes:
    buffer = io.BytesIO()
    first = Image.fromarray(scenes.smooth())
    rest = [first.transpose(Image.Transpose.ROTATE_180)] * others
    first.save(buffer, "MPO", save_all=True, append_images=rest, quality=97, subsampling=0)
    return buffer.getvalue()


def _first_of_mpo() -> bytes:
    whole = _mpo(1)
    return whole[: whole.index(b"\xff\xd9\xff\xd8") + 2]


def _broken() -> Iterator[Case]:
    data, slow = plain(), plain(progressive=True)
    frame = data.index(b"\xff\xc0")
    scan = data.index(b"\xff\xda")
    tables = data.index(b"\xff\xdb")
    table_end = tables + 2 + int.from_bytes(data[tables + 2 : tables + 4], "big")
    broken = {
        **{f"cut-at-{p}-percent": data[: len(data) * p // 100] for p in (5, 30, 60, 80, 95)},
        **{f"progressive-cut-at-{p}-percent": slow[: len(slow) * p // 100] for p in (20, 60, 90)},
        "header-alone": data[:scan],
        "no-frame": data[:frame] + data[scan:],
        "no-scan": data[:scan] + b"\xff\xd9",
        "no-quantisation": data[:tables]
        + data[table_end:].replace(b"\xff\xdb\0C\1", b"\xff\xfe\0C\1"),
        "width-0": data[: frame + 7] + b"\0\0" + data[frame + 9 :],
        "9-bits": data[: frame + 4] + b"\x09" + data[frame + 5 :],
        "no-component": data[: frame + 9] + b"\0" + data[frame + 10 :],
        "sampling-0": data[: frame + 11] + b"\0" + data[frame + 12 :],
        "start-alone": b"\xff\xd8\xff",
        "start-and-zeros": b"\xff\xd8\xff" + bytes(500),
        "start-and-end": b"\xff\xd8\xff\xd9",
        "zero-filled": data[: scan + 100] + bytes(len(data) - scan - 100),
    }
    for name, whole in broken.items():
        yield refusal(f"jpeg/broken/{name}", whole, "broken")
    small = io.BytesIO()
    Image.fromarray(scenes.smooth(15, 64)).save(small, "JPEG")
    yield refusal("jpeg/small/15x64", small.getvalue(), "small")
