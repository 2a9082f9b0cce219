"""Colour profiles by hand (ICC.1:2001-04 for version 2, ICC.1:2022 for version 4).

What matrix profiles do is computed from their chromaticities in floating point; what tables do is
left to littleCMS. Sources of the numbers: IEC 61966-2-1 (sRGB), SMPTE EG 432-1 (P3), Adobe RGB
(1998), ROMM RGB (ISO 22028-2).
"""

import io
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from pictures.case import Array

D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
"""Gamma, a, b, c, d of a parametric curve of type 3."""
_D65 = (0.3127, 0.3290)


class Colours(NamedTuple):
    """White, red, green and blue as (x, y), and a gamma, or None for sRGB's curve."""

    white: tuple[float, float]
    red: tuple[float, float]
    green: tuple[float, float]
    blue: tuple[float, float]
    gamma: float | None


SRGB = Colours(_D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06), None)
DISPLAY_P3 = Colours(_D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060), None)
ADOBE_RGB = Colours(_D65, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06), 563 / 256)
PROPHOTO = Colours((0.3457, 0.3585), (0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), 1.8)
SWAPPED = Colours(_D65, (0.15, 0.06), (0.30, 0.60), (0.64, 0.33), None)
"""sRGB with red and blue exchanged: whoever leaves it out is seen at once."""
LINEAR = Colours(_D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06), 1.0)
SPACES = {
    "srgb": SRGB,
    "display-p3": DISPLAY_P3,
    "adobe-rgb": ADOBE_RGB,
    "prophoto": PROPHOTO,
    "swapped": SWAPPED,
    "linear": LINEAR,
}


def to_xyz(colours: Colours) -> Array:
    """(3, 3): linear red, green and blue to XYZ as seen from D50."""

    def xyz(point: tuple[float, float]) -> Array:
        x, y = point
        return np.array([x / y, 1.0, (1 - x - y) / y])

    white = xyz(colours.white)
    basis = np.stack([xyz(colours.red), xyz(colours.green), xyz(colours.blue)], 1)
    matrix = basis * np.linalg.solve(basis, white)
    gains = (_BRADFORD @ D50) / (_BRADFORD @ white)
    return np.linalg.inv(_BRADFORD) @ np.diag(gains) @ _BRADFORD @ matrix


def linear(levels: Array, gamma: float | None) -> Array:
    """Levels to 255 as light to 1."""
    value = levels / 255
    if gamma is not None:
        return value**gamma
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def srgb_levels(light: Array) -> Array:
    """Linear light of sRGB as levels to 255; what sRGB cannot show is clipped."""
    light = np.clip(light, 0, 1)
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return 255 * signal


def shown(levels: Array, colours: Colours) -> Array:
    """(h, w, 3) of levels in ``colours``, as levels in sRGB."""
    light = linear(levels, colours.gamma)
    return srgb_levels(light @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(colours)).T)


# --- files ----------------------------------------------------------------------------------------


def _fixed(values: Any) -> bytes:
    return b"".join(struct.pack(">i", round(float(v) * 65536)) for v in np.ravel(values))


def _xyz_tag(values: Any) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _gamma_tag(gamma: float | None, version: int) -> bytes:
    if version == 4:
        if gamma is None:
            return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(SRGB_CURVE)
        return b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + _fixed([gamma])
    if gamma is not None and gamma * 256 == round(gamma * 256):
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    table = 65535 * linear(np.linspace(0, 255, 1024), gamma)
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + table.round().astype(">u2").tobytes()


def _text_tag(text: bytes, version: int) -> bytes:
    if version == 4:
        wide = text.decode().encode("utf-16-be")
        return (
            b"mluc\0\0\0\0"
            + struct.pack(">II", 1, 12)
            + b"enUS"
            + struct.pack(">II", len(wide), 28)
            + wide
        )
    return b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" + bytes(78)


def profile(
    tags: dict[bytes, bytes],
    *,
    version: int = 2,
    kind: bytes = b"mntr",
    space: bytes = b"RGB ",
    pcs: bytes = b"XYZ ",
) -> bytes:
    """A whole profile; what every profile must have is added to ``tags``."""
    tags = {
        b"desc": _text_tag(b"corpus", version),
        b"cprt": _text_tag(b"CC0", 4) if version == 4 else b"text\0\0\0\0CC0\0",
        b"wtpt": _xyz_tag(D50),
        **tags,
    }
    at, table, body = 132 + 12 * len(tags), b"", b""
    for signature, data in tags.items():
        table += signature + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = at + len(body)
    head = struct.pack(">I4sI", size, b"lcms", version << 24) + kind + space + pcs
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(4 * 2 + 4 * 2 + 8)
    head += struct.pack(">I", 0) + _fixed(D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def rgb_profile(colours: Colours, version: int = 2) -> bytes:
    """A matrix and three equal curves."""
    matrix = to_xyz(colours)
    curve = _gamma_tag(colours.gamma, version)
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)
    tags = {name: _xyz_tag(column) for name, column in columns}
    tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    return profile(tags, version=version)


def grey_profile(gamma: float | None, version: int = 2) -> bytes:
    """One curve; the colours are grey."""
    return profile({b"kTRC": _gamma_tag(gamma, version)}, version=version, space=b"GRAY")


def table_profile(
    space: bytes, to_lab: Callable[[Array], Array], *, grid: int = 9, kind: bytes = b"prtr"
) -> bytes:
    """A ``lut16`` table from colours (n, channels) of 0 to 1 to Lab (n, 3); version 2's Lab."""
    channels = {b"RGB ": 3, b"CMYK": 4, b"GRAY": 1}[space]
    axes = np.meshgrid(*[np.linspace(0, 1, grid)] * channels, indexing="ij")
    lab = to_lab(np.stack([axis.ravel() for axis in axes], -1))
    coded = np.stack(  # ICC.1:2001-04, table 8: L* to 0xFF00, a* and b* around 0x8000
        [lab[:, 0] * 652.8, (lab[:, 1] + 128) * 256, (lab[:, 2] + 128) * 256], -1
    )
    body = b"mft2\0\0\0\0" + bytes([channels, 3, grid, 0]) + _fixed(np.eye(3))
    body += struct.pack(">HH", 2, 2) + struct.pack(">HH", 0, 65535) * channels
    body += coded.round().clip(0, 65535).astype(">u2").tobytes()
    body += struct.pack(">HH", 0, 65535) * 3
    return profile({b"A2B0": body}, kind=kind, space=space, pcs=b"Lab ")


def press_lab(cmyk: Array) -> Array:
    """Ink on paper, roughly: no press of this world, so that nobody guesses it."""
    c, m, y, k = cmyk.T
    light = (1 - 0.55 * c) * (1 - 0.6 * m) * (1 - 0.1 * y) * (1 - 0.95 * k)
    return np.stack(
        [97 * light, (60 * m - 35 * c) * (1 - k), (80 * y - 45 * c - 5 * m) * (1 - k)], -1
    )


def swapped_lab(rgb: Array) -> Array:
    """Red and blue exchanged, for a table instead of a matrix."""
    red, green, blue = rgb.T
    return np.stack(
        [20 + 25 * red + 40 * green + 15 * blue, 50 * blue - 50 * green, 50 * green - 50 * red], -1
    )


def by_littlecms(levels: Array, icc: bytes, mode: str) -> Array:
    """(h, w, c) of uint8 through a profile to sRGB, perceptually, as levels."""
    flat = levels[..., 0] if levels.shape[2] == 1 else levels
    image = Image.frombytes(mode, (flat.shape[1], flat.shape[0]), flat.astype(np.uint8).tobytes())
    converted = ImageCms.profileToProfile(
        image,
        ImageCms.ImageCmsProfile(io.BytesIO(icc)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.PERCEPTUAL,
        outputMode="RGB",
    )
    assert converted is not None
    return np.asarray(converted).astype(np.float64)


def damaged() -> dict[str, bytes]:
    """Profiles that count as none, each for a reason of its own."""
    sound = rgb_profile(SWAPPED)
    return {
        "empty": b"",
        "text": b"this is no profile " * 20,
        "cut-in-header": sound[:90],
        "cut-in-table": sound[:150],
        "without-signature": sound[:36] + b"xxxx" + sound[40:],
        "without-curves": profile({b"rXYZ": _xyz_tag(D50)}),
        "of-cmyk": table_profile(b"CMYK", press_lab),
        "of-no-space": sound[:16] + b"8CLR" + sound[20:],
        "device-link": sound[:12] + b"link" + sound[16:],
        "many-tags": sound[:128] + struct.pack(">I", 0x7FFFFFFF) + sound[132:],
        "far-tags": sound[:132]
        + b"".join(
            sound[at : at + 4] + struct.pack(">I", 0x7FFFFF00) + sound[at + 8 : at + 12]
            for at in range(132, 132 + 12 * 9, 12)
        )
        + sound[132 + 12 * 9 :],
    }
