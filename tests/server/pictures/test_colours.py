"""Colours as viewers show them, told by arithmetic with the published numbers of each space."""

import io
import struct
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from redux_server.pictures import colours
from redux_server.pictures.colours import conversion, matrix_profile, profile_of
from redux_server.pictures.essence import MAX_PROFILE_BYTES, Numbers
from server.hostile_images import chunk, encoded
from server.pictures_in_process import decoded, png_of

RNG = np.random.default_rng(7)
VALUES = RNG.integers(0, 256, (40, 50, 3)).astype(np.uint8)
PICTURE = Image.fromarray(VALUES)

D65 = (0.3127, 0.3290)
SRGB = (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
# IEC 61966-2-1; SMPTE EG 432-1; Adobe RGB (1998), 4.3; ISO 22028-2; ITU-R BT.2020, table 3
P3 = (D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE = (D65, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
PROPHOTO = ((0.3457, 0.3585), (0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))
BT2020 = (D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046))


def srgb_light(x):
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def srgb_signal(x):
    return np.where(x <= 0.0031308, x * 12.92, 1.055 * np.maximum(x, 0) ** (1 / 2.4) - 0.055)


def power(gamma):
    return lambda x: x**gamma


def to_xyz(points):
    """The matrix from RGB to XYZ at D50: Bruce Lindbloom's formulas, in numpy."""
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in points)
    matrix = np.stack(primaries, 1)
    matrix = matrix * np.linalg.solve(matrix, white)
    cones = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    gains = cones @ [0.9642, 1, 0.8249] / (cones @ white)
    return np.linalg.inv(cones) @ np.diag(gains) @ cones @ matrix


def in_srgb(values, points, light):
    """What 8-bit ``values`` of another space are as 8-bit sRGB, as floats."""
    linear = light(values / 255)
    seen = linear @ to_xyz(points).T @ np.linalg.inv(to_xyz(SRGB)).T
    return 255 * srgb_signal(seen.clip(0, 1))


def profile(points, curve, space=b"RGB "):
    """An ICC profile, version 2, written by hand: ``curve`` is a gamma."""

    def s15(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    matrix = to_xyz(points)
    trc = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * curve)) + b"\0\0"
    tags = [(b"wtpt", b"XYZ \0\0\0\0" + s15(0.9642, 1, 0.8249))]
    if space == b"RGB ":
        tags += [
            (b"rgb"[i : i + 1] + b"XYZ", b"XYZ \0\0\0\0" + s15(*matrix[:, i])) for i in range(3)
        ]
        tags += [(b"rgb"[i : i + 1] + b"TRC", trc) for i in range(3)]
    else:
        tags.append((b"kTRC", trc))
    return icc(space, b"XYZ ", tags)


def icc(space, connection, tags, kind=b"mntr"):
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags:
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = b"\0\0\0\0" + b"\x02\x40\0\0" + kind + space + connection + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">iii", 63190, 65536, 54061) + bytes(48)
    return struct.pack(">I", 132 + len(table) - 4 + len(body)) + head + table + body


def assert_close(got, expected, worst=3):
    difference = np.abs(got.astype(float) - expected)
    assert difference.max() <= worst and difference.mean() < 0.7


SPACES = {
    "Display P3": (P3, 2.2),
    "Adobe RGB": (ADOBE, 2.19921875),
    "ProPhoto": (PROPHOTO, 1.8),
    "linear": (SRGB, 1.0),
}
CONTAINERS = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize("format_name", CONTAINERS)
@pytest.mark.parametrize(("points", "gamma"), SPACES.values(), ids=SPACES)
def test_a_profile_is_applied(format_name, points, gamma):
    made = profile(points, gamma)
    data = encoded(PICTURE, format_name, icc_profile=made, **CONTAINERS[format_name])
    source = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert_close(decoded(format_name, data), in_srgb(source, points, power(gamma)))


@pytest.mark.parametrize("quality", [60, 95])
def test_a_profile_in_a_jpeg_is_applied_also_in_many_parts(quality):
    made = profile(P3, 2.2)
    smooth = PICTURE.resize((400, 300), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=quality, icc_profile=made)
    source = np.asarray(Image.open(io.BytesIO(data)))
    expected = in_srgb(source, P3, power(2.2))
    assert_close(decoded("JPEG", data), expected)
    whole = data.index(b"ICC_PROFILE\0\1\1")
    size = int.from_bytes(data[whole - 2 : whole], "big")
    body = data[whole + 14 : whole - 2 + size]
    parts = [
        b"\xff\xe2" + struct.pack(">H", len(part) + 16) + b"ICC_PROFILE\0" + bytes([i, 3]) + part
        for i, part in ((3, body[300:]), (1, body[:99]), (2, body[99:300]))
    ]
    split = data[: whole - 4] + b"".join(parts) + data[whole - 2 + size :]
    assert np.array_equal(decoded("JPEG", split), decoded("JPEG", data))
    lacking = data[: whole - 4] + b"".join(parts[:2]) + data[whole - 2 + size :]
    assert np.array_equal(decoded("JPEG", lacking), source), "a broken profile counts as none"


def test_a_profile_in_heic_is_applied():
    image = Image.fromarray(VALUES).resize((200, 160), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    heif = pillow_heif.from_pillow(image)
    heif.info["icc_profile"] = profile(P3, 2.2)
    heif.info["icc_profile_type"] = "prof"
    heif.save(out, quality=95)
    source = np.asarray(pillow_heif.open_heif(io.BytesIO(out.getvalue())).to_pillow())
    assert_close(decoded("HEIC", out.getvalue()), in_srgb(source, P3, power(2.2)))


@pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
def test_transparency_lies_on_white_after_the_colours_are_right(format_name):
    alpha = RNG.integers(0, 256, (40, 50, 1)).astype(np.uint8)
    image = Image.fromarray(np.concatenate([VALUES, alpha], 2))
    data = encoded(image, format_name, icc_profile=profile(P3, 2.2), lossless=True, exact=True)
    share = alpha / 255
    expected = share * in_srgb(VALUES, P3, power(2.2)) + (1 - share) * 255
    assert_close(decoded(format_name, data), expected)


def test_palettes_have_colours_too():
    image = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE, colors=60)
    data = encoded(image, "PNG", icc_profile=profile(ADOBE, 2.2))
    expected = in_srgb(np.asarray(image.convert("RGB")), ADOBE, power(2.2))
    assert_close(decoded("PNG", data), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
@pytest.mark.parametrize("space", [b"GRAY", b"RGB "])
def test_grey_with_a_profile_of_grey_or_of_colours(mode, space):
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(20, 0)
    image = Image.fromarray(ramp)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "1":
        image, ramp = image.convert("1", dither=0), np.where(ramp > 127, 255, 0)
    else:
        image = image.convert(mode)
    data = encoded(image, "PNG", icc_profile=profile(SRGB, 1.0, space))
    expected = (255 * srgb_signal(ramp / 255))[..., None].repeat(3, 2)
    assert_close(decoded("PNG", data), expected)


def cmyk_profile(colours_of):
    """A printer's profile (lut8) of 2 steps an ink; ``colours_of`` inks 0…1 is Lab."""
    identity = bytes(range(256))
    grid = b""
    for index in range(16):
        inks = [index >> shift & 1 for shift in (3, 2, 1, 0)]
        light, a, b = colours_of(*inks)
        grid += bytes([round(light * 2.55), round(a + 128), round(b + 128)])
    unit = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + identity * 4 + grid + identity * 3
    return icc(b"CMYK", b"Lab ", [(b"A2B0", lut)], b"prtr")


@pytest.mark.parametrize("format_name", ["JPEG", "TIFF"])
def test_inks_are_what_their_profile_says(format_name):
    def lab(_c, _m, _y, k):
        return 100 - 100 * k, 0, 0  # a printer without colours

    inks = np.zeros((32, 32, 4), np.uint8)
    inks[:, 16:, 3] = 128
    options = {"quality": 100} if format_name == "JPEG" else {}
    picture = Image.fromarray(inks, "CMYK")
    data = encoded(picture, format_name, icc_profile=cmyk_profile(lab), **options)
    for column, light in ((3, 100), (28, 49.8)):
        luminance = ((light + 16) / 116) ** 3
        expected = 255 * float(srgb_signal(np.array(luminance)))
        assert decoded(format_name, data)[5, column] == pytest.approx([expected] * 3, abs=4)


def test_lab_tiff():
    lab = np.zeros((20, 30, 3), np.uint8)
    lab[..., 0] = np.linspace(0, 255, 30)
    data = encoded(Image.fromarray(lab, "LAB"), "TIFF")
    light = lab[..., :1] / 2.55
    luminance = np.where(light > 8, ((light + 16) / 116) ** 3, light / 903.3)
    assert_close(decoded("TIFF", data), 255 * srgb_signal(luminance).repeat(3, 2), worst=5)


# --- what counts as sRGB, and as none -------------------------------------------------------------


def test_srgb_stays_bit_for_bit():
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    curve = srgb_light(np.linspace(0, 1, 1024))
    for made in (own, matrix_profile(SRGB, list(curve))):
        for format_name in ("PNG", "TIFF"):
            data = encoded(PICTURE, format_name, icc_profile=made)
            assert np.array_equal(decoded(format_name, data), VALUES)


P3_PROFILE = profile(P3, 2.2)
BROKEN = {
    "nothing": b"",
    "noise": RNG.bytes(3000),
    "a head alone": P3_PROFILE[:128],
    "cut off": P3_PROFILE[:300],
    "of no kind": P3_PROFILE[:12] + b"abcd" + P3_PROFILE[16:],
    "a link": P3_PROFILE[:12] + b"link" + P3_PROFILE[16:],
    "of grey": profile(P3, 1.0, b"GRAY"),
    "of inks": cmyk_profile(lambda *_: (50, 0, 0)),
    "of an unknown space": P3_PROFILE[:16] + b"HLS " + P3_PROFILE[20:],
    "too large": P3_PROFILE + bytes(MAX_PROFILE_BYTES),
    "places beyond": P3_PROFILE[:136] + b"\xff" * 60 + P3_PROFILE[196:],
}


@pytest.mark.parametrize("made", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_broken_profile_counts_as_none(made, format_name):
    data = encoded(PICTURE, format_name, icc_profile=made, lossless=True)
    is_lossy = format_name == "JPEG"
    source = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) if is_lossy else VALUES
    assert np.array_equal(decoded(format_name, data), source)


def test_of_a_broken_profile_the_numbers_beside_count():
    numbers = Numbers(gamma=100_000)
    assert conversion("RGB", b"", numbers) and conversion("RGB", RNG.bytes(2000), numbers)
    assert conversion("RGB", BROKEN["cut off"], numbers)
    assert conversion("CMYK", b"", numbers) is None
    assert conversion("RGB", b"", Numbers()) is None


# --- numbers --------------------------------------------------------------------------------------

HEAD, *REST = (
    (b"IHDR", struct.pack(">IIBBBBB", 50, 40, 8, 2, 0, 0, 0)),
    (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in VALUES))),
    (b"IEND", b""),
)


def gama(value):
    return b"gAMA", struct.pack(">I", value)


def chrm(points):
    return b"cHRM", struct.pack(">8I", *(round(100_000 * each) for xy in points for each in xy))


def cicp(*values):
    return b"cICP", bytes((*values, 0, 1))


def pq(x):
    """BT.2100, table 4, in terms of a white of 203 cd/m² (BT.2408)."""
    p = x ** (32 / 2523)
    return (
        10_000
        / 203
        * (np.maximum(p - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * p)) ** (8192 / 1305)
    ).clip(0, 1)


P3_ICC = (b"iCCP", b"n\0\0" + zlib.compress(P3_PROFILE))
TELLING = {
    "linear": ([gama(100_000)], SRGB, power(1)),
    "a Macintosh of old": ([gama(55_556)], SRGB, power(1.8)),
    "points alone": ([chrm(P3)], P3, srgb_light),
    "points and gamma": ([gama(50_000), chrm(ADOBE)], ADOBE, power(2)),
    "a profile before gamma": ([gama(100_000), P3_ICC], P3, power(2.2)),
    "cICP of P3": ([cicp(12, 13), gama(100_000)], P3, srgb_light),
    "cICP before a profile": ([(b"iCCP", b"n\0\0x"), cicp(9, 13)], BT2020, srgb_light),
    "cICP of PQ": ([cicp(9, 16)], BT2020, pq),
    "cICP linear": ([cicp(1, 8)], SRGB, power(1)),
}


@pytest.mark.parametrize(("said", "points", "light"), TELLING.values(), ids=TELLING)
def test_numbers_in_a_png_are_applied(said, points, light):
    got = decoded("PNG", png_of(HEAD, *said, *REST))
    assert_close(got, in_srgb(VALUES, points, light), worst=4)


@pytest.mark.parametrize(
    "said",
    [
        [gama(45_455)],
        [gama(45_455), chrm(SRGB)],
        [chrm(SRGB)],
        [(b"sRGB", b"\0"), gama(100_000), chrm(P3)],
        [(b"sRGB", b"\7"), gama(45_455)],
        [cicp(1, 13), P3_ICC],
        [cicp(1, 1)],
        [cicp(2, 2)],
        [gama(0)],
        [gama(2**31)],
        [chrm(((0, 0),) * 4)],
        [chrm(((0.3, 0.3),) * 4)],
        [(b"iCCP", b"n\0\0x")],
    ],
)
def test_srgb_in_numbers_and_numbers_that_make_no_sense_change_nothing(said):
    assert np.array_equal(decoded("PNG", png_of(HEAD, *said, *REST)), VALUES)


def test_what_is_brighter_than_white_is_white():
    bright = profile_of(Numbers(cicp=(9, 18)))
    assert bright is not None
    wanted, convert = conversion("RGB", bright, Numbers())
    greys = Image.fromarray(np.array([[[v] * 3 for v in (0, 128, 191, 255)]], np.uint8))
    levels = np.asarray(convert(greys.convert(wanted)))[0, :, 1].astype(int)
    assert levels[0] == 0 and 100 < levels[1] < 200 and levels[2] >= 253 and levels[3] == 255


@pytest.mark.parametrize("format_name", ["AVIF", "HEIC"])
def test_numbers_in_avif_and_heic_are_applied(format_name):
    options = {"quality": 100, "subsampling": "4:4:4"} if format_name == "AVIF" else {}
    data = encoded(PICTURE, format_name, **options)
    at = data.index(b"colrnclx") + 8
    said = data[:at] + struct.pack(">HH", 12, 13) + data[at + 4 :]
    source = decoded(format_name, data)
    assert_close(decoded(format_name, said), in_srgb(source, P3, srgb_light))


def test_a_chunk_is_a_chunk():
    assert chunk(*HEAD) == png_of(HEAD)[8:]
    assert colours.SAME_LEVELS < 3, "what the eye does not see"
