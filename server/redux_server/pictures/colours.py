"""Colours as they are meant: what a file says of its own becomes sRGB, which the model is fed.

A profile (ICC.1) goes through littleCMS; numbers of PNG's chunks and of H.273 become a profile
first. Decision 0031 says which count, and how. Runs confined, in the process that decodes, strip
by strip. Knows no files.

Sources: ICC.1:2022; ITU-T H.273; PNG (third edition), 11.3.2 and 13.16; ITU-R BT.2100 for PQ and
HLG, BT.2408 for the level of white.
"""

import io
import struct
from collections.abc import Callable, Sequence

from PIL import Image, ImageCms

from redux_server.pictures.essence import Numbers

Convert = Callable[[Image.Image], Image.Image]
"""Opaque pixels of a mode that was asked for, to RGB in sRGB."""

SAME_LEVELS = 2
"""Of 255: a profile that moves no colour by more is sRGB by another name, and pixels stay."""

XY = tuple[float, float]
_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_CLASSES = (b"scnr", b"mntr", b"prtr", b"spac")
_SRGB = ((0.3127, 0.3290), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
_D65 = (0.3127, 0.3290)
# White, red, green and blue of H.273, table 2.
_PRIMARIES: dict[int, tuple[XY, XY, XY, XY]] = {
    1: _SRGB,
    4: ((0.310, 0.316), (0.67, 0.33), (0.21, 0.71), (0.14, 0.08)),
    5: (_D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: (_D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: (_D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    9: (_D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: ((0.314, 0.351), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    12: (_D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    22: (_D65, (0.630, 0.340), (0.295, 0.605), (0.155, 0.077)),
}
# H.273, table 3. Video's own curve is shown as sRGB's, as browsers do.
_GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
_PQ, _HLG = 16, 18
_WHITE_NITS = 203.0  # BT.2408: diffuse white; what is brighter is white, too
_ENTRIES = 4096
# libpng: gammas within 5 % are the same (PNG_GAMMA_THRESHOLD), points within a thousandth.
_PNG_GAMMA, _PNG_SAME_GAMMA, _PNG_SAME_POINT = 45455, 0.05, 0.0011


def conversion(mode: str, profile: bytes, numbers: Numbers) -> tuple[str, Convert] | None:
    """From what mode, and how, pixels of ``mode`` become sRGB; None where they are so already.

    A profile that is broken, of another kind of colours or of no known class counts as none.
    """
    if mode == "LAB":
        return _checked("LAB", ImageCms.createProfile("LAB"))
    found = _of_profile(mode, profile)
    if found is None and mode != "CMYK":
        made = profile_of(numbers)
        found = ("RGB", made) if made else None
    if found is None:
        return None
    wanted, data = found
    try:
        return _checked(wanted, ImageCms.ImageCmsProfile(io.BytesIO(data)))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None if data is not profile else conversion(mode, b"", numbers)


def _of_profile(mode: str, profile: bytes) -> tuple[str, bytes] | None:
    """The profile with the mode that it is for, if pictures of ``mode`` are or can be so."""
    if len(profile) < 132 or profile[36:40] != b"acsp" or profile[12:16] not in _CLASSES:
        return None
    wanted = _SPACES.get(profile[16:20].decode("latin-1"))
    fits = wanted == mode or (wanted == "RGB" and mode == "L")
    return (wanted, profile) if wanted and fits else None


def _checked(mode: str, profile: object) -> tuple[str, Convert] | None:
    # littleCMS makes a table of few steps of a curve for grey, unless told not to
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(
        profile,  # type: ignore[arg-type]
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.PERCEPTUAL,
        flags=flags,
    )

    def convert(image: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None
        return converted

    if mode in ("RGB", "L") and _moves_nothing(mode, convert):
        return None
    return mode, _by_levels(convert) if mode == "L" else convert


def _by_levels(convert: Convert) -> Convert:
    """The same for grey, by a table of its 256 levels."""
    ramp = convert(Image.frombytes("L", (256, 1), bytes(range(256))))
    tables = [channel.tobytes() for channel in ramp.split()]
    return lambda image: Image.merge("RGB", [image.point(list(table)) for table in tables])


def _moves_nothing(mode: str, convert: Convert) -> bool:
    levels = range(256) if mode == "L" else range(0, 256, 15)
    samples = (
        bytes(levels)
        if mode == "L"
        else bytes(each for r in levels for g in levels for b in levels for each in (r, g, b))
        + bytes(each for grey in range(256) for each in (grey, grey, grey))
    )
    strip = Image.frombytes(mode, (len(samples) // len(mode), 1), samples)
    before, after = strip.convert("RGB").tobytes(), convert(strip).tobytes()
    return all(abs(a - b) <= SAME_LEVELS for a, b in zip(before, after, strict=True))


def profile_of(numbers: Numbers) -> bytes | None:
    """A profile for what a file says in numbers, or None where that is sRGB, or nothing."""
    if numbers.cicp is not None:
        return _of_cicp(*numbers.cicp)
    points = _of_chromaticities(numbers.chromaticities)
    gamma = None
    if numbers.gamma and 16 <= numbers.gamma <= 625_000_000:  # as libpng has it
        ratio = numbers.gamma / _PNG_GAMMA
        gamma = None if abs(ratio - 1) < _PNG_SAME_GAMMA else 100_000 / numbers.gamma
    if points is None and gamma is None:
        return None
    curve = _srgb_curve() if gamma is None else [x**gamma for x in _signals()]
    return matrix_profile(points or _SRGB, curve)


def _of_cicp(primaries: int, transfer: int) -> bytes | None:
    points = _PRIMARIES.get(primaries, _SRGB)
    if transfer == _PQ:
        curve = [min(1.0, _pq_nits(x) / _WHITE_NITS) for x in _signals()]
    elif transfer == _HLG:
        white = _hlg_light(0.75)
        curve = [min(1.0, _hlg_light(x) / white) for x in _signals()]
    elif transfer in _GAMMAS:
        curve = [x ** _GAMMAS[transfer] for x in _signals()]
    elif points == _SRGB:
        return None
    else:
        curve = _srgb_curve()
    return matrix_profile(points, curve)


def _of_chromaticities(values: tuple[int, ...] | None) -> tuple[XY, XY, XY, XY] | None:
    if values is None or any(not 0 < y <= 100_000 for y in values[1::2]):
        return None
    points = tuple((values[at] / 100_000, values[at + 1] / 100_000) for at in range(0, 8, 2))
    pairs = zip(points, _SRGB, strict=True)
    if all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= _PNG_SAME_POINT for a, b in pairs):
        return None
    white, red, green, blue = points
    return white, red, green, blue


def _signals() -> list[float]:
    return [each / (_ENTRIES - 1) for each in range(_ENTRIES)]


def _srgb_curve() -> list[float]:
    return [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in _signals()]


def _pq_nits(signal: float) -> float:
    power = signal ** (1 / 78.84375)
    return float(
        10_000
        * (max(0.0, power - 0.8359375) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    )


def _hlg_light(signal: float) -> float:
    if signal <= 0.5:
        return signal**2 / 3
    return float((2.718281828459045 ** ((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)


# --- profiles -------------------------------------------------------------------------------------

_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))
Rows = Sequence[Sequence[float]]


def matrix_profile(points: tuple[XY, XY, XY, XY], curve: Sequence[float]) -> bytes | None:
    """An ICC profile, version 2, of RGB by white, red, green and blue, and one curve for all.

    None where these points make no colour space.
    """
    white, *primaries = (_xyz(x, y) for x, y in points)
    try:
        columns = _transposed(primaries)
        scales = _applied(_inverse(columns), white)
        cones = _applied(_BRADFORD, white)
        gains = [b / a for a, b in zip(cones, _applied(_BRADFORD, _D50), strict=True)]
        scaled = [[gain * each for each in row] for gain, row in zip(gains, _BRADFORD, strict=True)]
        adapt = _product(_inverse(_BRADFORD), scaled)
        colorants = [
            _applied(adapt, [scale * each for each in primary])
            for scale, primary in zip(scales, primaries, strict=True)
        ]
        places = [b"XYZ \0\0\0\0" + b"".join(map(_s15, each)) for each in colorants]
    except (ZeroDivisionError, struct.error, OverflowError):
        return None
    levels = [round(65535 * min(1.0, max(0.0, each))) for each in curve]
    table = b"curv\0\0\0\0" + struct.pack(f">I{len(levels)}H", len(levels), *levels)
    tags = [(b"wtpt", b"XYZ \0\0\0\0" + b"".join(map(_s15, _D50)))]
    tags += list(zip((b"rXYZ", b"gXYZ", b"bXYZ"), places, strict=True))
    return _icc(tags, table)


def _icc(tags: list[tuple[bytes, bytes]], table: bytes) -> bytes:
    """The three curves are one: their entries point to the same place."""
    names = (b"rTRC", b"gTRC", b"bTRC")
    start = 132 + 12 * (len(tags) + len(names))
    entries, body = b"", b""
    for name, value in tags:
        entries += struct.pack(">4sII", name, start + len(body), len(value))
        body += value
    for name in names:
        entries += struct.pack(">4sII", name, start + len(body), len(table))
    body += table
    count = struct.pack(">I", len(tags) + len(names))
    head = struct.pack(">I4xI4s4s4s12x4s", start + len(body), 0x02400000, *_KINDS, b"acsp")
    white = b"".join(map(_s15, _D50))
    return head.ljust(68, b"\0") + white.ljust(60, b"\0") + count + entries + body


_KINDS = (b"mntr", b"RGB ", b"XYZ ")


def _s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(x: float, y: float) -> list[float]:
    return [x / y, 1.0, (1 - x - y) / y]


def _transposed(rows: Rows) -> list[list[float]]:
    return [list(each) for each in zip(*rows, strict=True)]


def _applied(rows: Rows, vector: Sequence[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in rows]


def _product(a: Rows, b: Rows) -> list[list[float]]:
    return _transposed([_applied(a, column) for column in _transposed(b)])


def _inverse(rows: Rows) -> list[list[float]]:
    (a, b, c), (d, e, f), (g, h, i) = rows
    cofactors = (
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    )
    whole = a * cofactors[0][0] + b * cofactors[1][0] + c * cofactors[2][0]
    return [[each / whole for each in row] for row in cofactors]
