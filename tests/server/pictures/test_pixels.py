"""What is thrown away anyway never decides; what is a part of the picture always does.

In this process, without the child: ``test_decode`` has that. What a picture should look like comes
from what it was made of, never from the code that is tested.
"""

import io
import struct
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from redux_server.pictures import essence, pixels
from redux_server.pictures.pixels import reduction
from server.hostile_images import chunk, encoded, gradient
from server.pictures_in_process import REFUSED, chunks_of, decoded, png_of


def broken(kind, body):
    """A chunk with a wrong checksum."""
    whole = chunk(kind, body)
    return whole[:-1] + bytes([whole[-1] ^ 255])


PICTURE = gradient(90, 61)
PNG = encoded(PICTURE, "PNG")
IHDR, *IDAT, IEND = chunks_of(PNG)
BOMB = zlib.compress(bytes(30 * 2**20), 9)
FCTL = (b"fcTL", struct.pack(">IIIIIHHBB", 0, 90, 61, 0, 0, 1, 10, 0, 0))
BESIDE = {
    "a text with a wrong checksum": [broken(b"tEXt", b"a\0b")],
    "a text without a keyword": [(b"tEXt", b"\0\0\0")],
    "a text that unpacks to much": [(b"zTXt", b"k\0\0" + BOMB)],
    "an international text that does": [(b"iTXt", b"k\0\1\0\0\0" + BOMB)],
    "a text that is not packed": [(b"zTXt", b"k\0\0nonsense")],
    "a text of an unknown packing": [(b"zTXt", b"k\0\7nonsense")],
    "a profile that unpacks to much": [(b"iCCP", b"k\0\0" + BOMB)],
    "a profile that is none": [(b"iCCP", b"k\0\0" + zlib.compress(bytes(range(256)) * 9999))],
    "a profile with a wrong checksum": [broken(b"iCCP", b"k\0\0x")],
    "a profile without a name": [(b"iCCP", b"")],
    "wrong pHYs": [broken(b"pHYs", struct.pack(">IIB", 2835, 2835, 1))],
    "short pHYs": [(b"pHYs", b"\0")],
    "empty sRGB": [(b"sRGB", b"")],
    "short gAMA": [(b"gAMA", b"x")],
    "gAMA of nothing": [(b"gAMA", bytes(4))],
    "cHRM of nothing": [(b"cHRM", bytes(32))],
    "short cHRM": [(b"cHRM", bytes(5))],
    "short cICP": [(b"cICP", b"\1")],
    "tRNS with a wrong checksum": [broken(b"tRNS", bytes(6))],
    "short tRNS": [(b"tRNS", b"\0")],
    "a palette for others": [(b"PLTE", b"\1\2\3\4")],
    "a palette for others, wrong": [broken(b"PLTE", b"\1\2\3")],
    "broken eXIf": [(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + bytes(9))],
    "empty eXIf": [(b"eXIf", b"")],
    "acTL of no frames": [(b"acTL", bytes(8))],
    "two acTL": [(b"acTL", struct.pack(">II", 1, 0))] * 2,
    "acTL with a wrong checksum": [broken(b"acTL", struct.pack(">II", 1, 0))],
    "acTL that is short": [(b"acTL", b"\0")],
    "fcTL before acTL": [FCTL, (b"acTL", struct.pack(">II", 1, 0))],
    "fcTL of another size": [
        (b"acTL", struct.pack(">II", 2, 0)),
        (b"fcTL", struct.pack(">IIIIIHHBB", 0, 9000, 61, 7, 7, 1, 10, 9, 9)),
    ],
    "fcTL that is short": [(b"acTL", struct.pack(">II", 1, 0)), (b"fcTL", b"\0\0")],
    "chunks of one's own": [(b"prVt", b"x" * 99), broken(b"npTc", b"")],
}


@pytest.mark.parametrize("extra", BESIDE.values(), ids=BESIDE)
def test_what_is_beside_the_pixels_of_a_png_is_no_matter(extra):
    for data in (png_of(IHDR, *extra, *IDAT, IEND), png_of(IHDR, *IDAT, *extra, IEND)):
        assert np.array_equal(decoded("PNG", data), PICTURE)


@pytest.mark.parametrize("interlaced", [False, True])
def test_the_end_of_a_png_may_be_missing_but_no_row(interlaced):
    """The end: IEND, the checksum of IDAT, and Adler-32 of the rows."""
    noise = np.random.default_rng(5).integers(0, 256, (61, 90, 3), np.uint8)
    data = adam7(noise) if interlaced else encoded(Image.fromarray(noise), "PNG")
    body = b"".join(body for kind, body in chunks_of(data) if kind == b"IDAT")
    head = data[:33]
    for rest in (12, 11, 8, 4, 1):
        assert np.array_equal(decoded("PNG", data[:-rest]), noise), rest
    start = png_of((head[12:16], head[16:29])) + struct.pack(">I", len(body)) + b"IDAT"
    for rest in range(1, 5):
        assert np.array_equal(decoded("PNG", start + body[:-rest]), noise), rest
    wrong = png_of((b"IHDR", head[16:29]), (b"IDAT", body[:-1] + bytes([body[-1] ^ 1])), IEND)
    assert np.array_equal(decoded("PNG", wrong), noise)
    for rest in (40, 400, len(body) // 2):
        with pytest.raises(REFUSED):
            decoded("PNG", start + body[:-rest])


def adam7(values):
    """A PNG of ``values``, interlaced: Pillow writes none."""
    passes = (
        *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
        *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
    )
    rows = b"".join(
        b"\0" + row.tobytes() for x, y, dx, dy in passes for row in values[y::dy, x::dx] if row.size
    )
    height, width, _ = values.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return png_of((b"IHDR", head), (b"IDAT", zlib.compress(rows)), IEND)


@pytest.mark.parametrize(
    "data",
    [
        png_of(broken(*IHDR), *IDAT, IEND),
        png_of(IHDR, (b"IDAT", bytes(70)), IEND),
        png_of(IHDR, (b"IDAT", IDAT[0][1][:60] + b"\xff" * 40 + IDAT[0][1][100:]), IEND),
        png_of(IHDR, IEND),
        png_of(IHDR),
        png_of(*IDAT, IHDR, IEND),
    ],
    ids=["header", "no rows", "damaged", "nothing", "less", "order"],
)
def test_a_png_that_is_damaged_where_it_counts_is_refused(data):
    with pytest.raises(REFUSED):
        decoded("PNG", data)


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_with_fewer_rows_than_it_says_or_of_no_filter_is_refused(interlaced):
    noise = np.random.default_rng(5).integers(0, 256, (61, 90, 3), np.uint8)
    noise[-1] = 0
    data = adam7(noise) if interlaced else encoded(Image.fromarray(noise), "PNG")
    assert np.array_equal(decoded("PNG", data), noise)
    rows = zlib.decompress(b"".join(body for kind, body in chunks_of(data) if kind == b"IDAT"))
    for spoilt in (rows[:-271], rows[:-1], b"\x09" + rows[1:], rows[:-271] + b"\x05" + rows[-270:]):
        with pytest.raises(REFUSED):
            decoded("PNG", png_of((b"IHDR", data[16:29]), (b"IDAT", zlib.compress(spoilt)), IEND))


def test_a_palette_that_is_missing_is_refused():
    parts = chunks_of(encoded(PICTURE.convert("P"), "PNG"))
    with pytest.raises(REFUSED):
        decoded("PNG", png_of(*(part for part in parts if part[0] != b"PLTE")))


def test_a_palette_with_a_wrong_checksum_is_refused():
    parts = chunks_of(encoded(PICTURE.convert("P"), "PNG"))
    spoilt = [broken(*part) if part[0] == b"PLTE" else part for part in parts]
    with pytest.raises(REFUSED):
        decoded("PNG", png_of(*spoilt))


# --- transparency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_that_is_transparent_is_white_at_every_depth(depth):
    most = (1 << depth) - 1
    values = np.arange(32, dtype=np.uint32).reshape(1, 32).repeat(20, 0) % (most + 1)
    bits = (values[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(20, -1).astype(np.uint8), axis=1)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", 32, 20, depth, 0, 0, 0, 0)
    clear = min(most, 1)
    data = png_of((b"IHDR", head), (b"tRNS", struct.pack(">H", clear)), (b"IDAT", packed), IEND)
    expected = np.where(values == clear, 255, np.round(values * (255 / most)))
    assert np.array_equal(decoded("PNG", data), expected[..., None].repeat(3, 2).astype(np.uint8))


@pytest.mark.parametrize("depth", [8, 16])
def test_the_one_transparent_colour_is_meant_to_the_last_bit(depth):
    white = (1 << depth) - 1
    colours = np.array([[0, 0, 0], [0, 0, 1], [white, 0, 0], [1, 0, 0]])
    values = colours[np.arange(32) % 4][None].repeat(20, 0)
    kind = ">u2" if depth == 16 else np.uint8
    packed = zlib.compress(b"".join(b"\0" + row.astype(kind).tobytes() for row in values))
    head = struct.pack(">IIBBBBB", 32, 20, depth, 2, 0, 0, 0)
    data = png_of((b"IHDR", head), (b"tRNS", bytes(6)), (b"IDAT", packed), IEND)
    expected = np.where((values == 0).all(2, keepdims=True), white, values) >> (depth - 8)
    assert np.array_equal(decoded("PNG", data), expected)


def gif(screen, box, transparent=None):
    """A red frame ``box`` (left, top, width, height) on a screen, its palette black and red."""
    frame = Image.new("P", box[2:], 1)
    frame.putpalette([0, 0, 0, 255, 0, 0])
    data = encoded(frame, "GIF", optimize=False)
    packed = data[10]
    at = 13 + 3 * (2 << (packed & 7))
    palette = data[13:at]
    while data[at] == 0x21:
        at += 2
        while data[at]:
            at += 1 + data[at]
        at += 1
    control = b"" if transparent is None else b"\x21\xf9\4\1\0\0" + bytes([transparent]) + b"\0"
    head = b"GIF89a" + struct.pack("<HH", *screen) + bytes([packed, 0, 0]) + palette
    return head, control, b"," + struct.pack("<4H", *box) + data[at + 9 :]


@pytest.mark.parametrize("transparent", [None, 0])
@pytest.mark.parametrize("box", [(10, 10, 20, 20), (0, 0, 100, 40), (60, 0, 40, 80), (0, 0, 9, 9)])
def test_what_no_gif_frame_covers_is_white(box, transparent):
    expected = np.full((80, 100, 3), 255, np.uint8)
    left, top, width, height = box
    expected[top : top + height, left : left + width] = (255, 0, 0)
    assert np.array_equal(decoded("GIF", b"".join(gif((100, 80), box, transparent))), expected)


@pytest.mark.parametrize(
    "extra",
    [
        b"\x21\xfe\3abc\0",
        b"\x21\xfe\xffshort\0",
        b"\x21\xff\x0bNETSCAPE2.0\3\1\0\0\0",
        b"\x21\xff\0",
        b"\x21\xf9\2\0\0\0",
        b"\x21\x77\0",
        b"\0\0\0",
        b"",
    ],
)
def test_what_is_beside_the_frame_of_a_gif_is_no_matter(extra):
    if extra[:4] == b"\x21\xfe\xffs":
        extra = b"\x21\xfe\xff" + b"s" * 255 + b"\0"
    head, control, frame = gif((20, 20), (0, 0, 20, 20), 0)
    for data in (
        head + extra + control + frame,
        head + control + extra + frame,
        (head + control + frame)[:-1],
        (head + control + frame)[:-1] + extra,
    ):
        assert (decoded("GIF", data) == (255, 0, 0)).all()


def test_a_gif_that_is_cut_off_is_refused():
    noise = np.random.default_rng(1).integers(0, 256, (64, 64), np.uint8)
    data = encoded(Image.fromarray(noise), "GIF")
    assert np.array_equal(decoded("GIF", data)[..., 0], noise)
    for share in (0.3, 0.9, 0.99):
        with pytest.raises(REFUSED):
            decoded("GIF", data[: int(len(data) * share)])


@pytest.mark.parametrize("header", [56, 108, 124])
def test_alpha_that_a_bmp_does_not_use_is_no_alpha(header):
    colour = np.asarray(PICTURE)[::-1, :, ::-1]
    for alpha, expected in ((0, np.asarray(PICTURE)), (255, np.asarray(PICTURE))):
        body = np.dstack([colour, np.full(colour.shape[:2], alpha, np.uint8)]).tobytes()
        assert np.array_equal(decoded("BMP", bmp(header, 90, 61, body)), expected)
    mixed = np.dstack([colour, np.zeros(colour.shape[:2], np.uint8)])
    mixed[0, 0, 3] = 255
    assert (decoded("BMP", bmp(header, 90, 61, mixed.tobytes()))[0] == 255).all(), "it is used"


def bmp(header, width, height, body):
    head = struct.pack("<IiiHHIIiiII", header, width, height, 1, 32, 3, len(body), 0, 0, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    start = 14 + header
    whole = struct.pack("<IHHI", start + len(body), 0, 0, start) + head.ljust(header, b"\0") + body
    return b"BM" + whole


# --- JPEG -----------------------------------------------------------------------------------------

NOISE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (10, 14, 3), np.uint8)).resize(
    (140, 100), Image.Resampling.BICUBIC
)
JPEGS = {
    "baseline": encoded(NOISE, "JPEG", quality=90),
    "444": encoded(NOISE, "JPEG", quality=90, subsampling=0),
    "progressive": encoded(NOISE, "JPEG", quality=90, progressive=True),
    "grey": encoded(NOISE.convert("L"), "JPEG"),
    "CMYK": encoded(NOISE.convert("CMYK"), "JPEG"),
    "restarts": encoded(NOISE, "JPEG", restart_marker_rows=1),
    "progressive restarts": encoded(NOISE, "JPEG", restart_marker_blocks=2, progressive=True),
}


def as_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("data", JPEGS.values(), ids=JPEGS)
def test_the_end_of_a_jpeg_may_be_missing_but_no_block(data):
    expected = as_pillow(data)
    assert np.array_equal(decoded("JPEG", data), expected)
    for rest in (data[:-2], data[:-1], data[:-2] + bytes(50), data + b"<html>"):
        assert np.array_equal(decoded("JPEG", rest), expected)
    for cut in (12, 40, 200, len(data) // 2):
        with pytest.raises(REFUSED):
            decoded("JPEG", data[:-cut])


def test_a_jpeg_that_is_cut_at_a_restart_or_a_scan_is_refused():
    for name, marker in (
        ("restarts", b"\xff\xd2"),
        ("restarts", b"\xff\xd5"),
        ("progressive", b"\xff\xda"),
    ):
        data = JPEGS[name]
        with pytest.raises(REFUSED):
            decoded("JPEG", data[: data.rindex(marker)])


def segment(marker, body):
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


EXIF = b"Exif\0\0II*\0\x08\0\0\0"
JPEG_BESIDE = {
    "values beyond the end": EXIF + b"\1\0" + struct.pack("<HHII", 0x010E, 2, 4000, 60) + bytes(4),
    "values beyond 4 GB": EXIF + b"\1\0" + struct.pack("<HHII", 0x010E, 2, 9, 2**32 - 9) + bytes(4),
    "no entries": EXIF + b"\xff\xff",
    "no TIFF": b"Exif\0\0nonsense",
    "nothing": b"Exif\0\0",
    "an orientation of 77": EXIF + b"\1\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 77, 0) + bytes(4),
    "two orientations": EXIF + b"\1\0" + struct.pack("<HHIHH", 0x0112, 3, 2, 1, 1) + bytes(4),
    "XMP": b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta",
}


@pytest.mark.parametrize("body", JPEG_BESIDE.values(), ids=JPEG_BESIDE)
def test_exif_of_a_jpeg_is_no_matter_where_it_is_broken(body):
    data = JPEGS["baseline"]
    spoilt = data[:2] + segment(0xE1, body) + data[2:]
    assert np.array_equal(decoded("JPEG", spoilt), as_pillow(data))


@pytest.mark.parametrize(
    "extra",
    [
        segment(0xFE, b""),
        segment(0xFE, b"\xff\xd8\xff\xd9\xff\xda"),
        segment(0xE0, b"JFIF\0"),
        segment(0xE0, b"JFXX\0\x10\xff\xd8\xff\xd9"),
        segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        segment(0xE2, b"MPF\0"),
        segment(0xE2, b"ICC_PROFILE\0\1\2abc"),
        segment(0xE2, b"ICC_PROFILE\0\0\0abc"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xED, b"Photoshop 3.0\x008BIM\xff\xff\xff\xff\xff"),
        segment(0xEE, b"Adobe"),
        segment(0xEC, b"Ducky"),
        b"\xff\xff\xff",
        b"extra\0\0",
        b"\xff\xfe\0\0",
    ],
)
def test_what_is_beside_the_scans_of_a_jpeg_is_no_matter(extra):
    data = JPEGS["baseline"]
    tables = data.index(b"\xff\xdb")
    for spoilt in (data[:2] + extra + data[2:], data[:tables] + extra + data[tables:]):
        assert np.array_equal(decoded("JPEG", spoilt), as_pillow(data))


# --- WebP, TIFF, HEIC, AVIF -----------------------------------------------------------------------


def webp_of(*parts):
    body = b"".join(
        kind + struct.pack("<I", len(body)) + body + bytes(len(body) & 1) for kind, body in parts
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("lossless", [True, False])
def test_what_is_beside_the_pixels_of_a_webp_is_no_matter(lossless):
    data = encoded(PICTURE, "WEBP", lossless=lossless)
    size = (90 - 1).to_bytes(3, "little") + (61 - 1).to_bytes(3, "little")
    frame = data[12:16], data[20 : 20 + int.from_bytes(data[16:20], "little")]
    expected = as_pillow(data)
    for flags in (0, 0x2C, 0xFF & ~0x12):
        parts = [
            (b"VP8X", bytes((flags, 0, 0, 0)) + size),
            (b"ICCP", b"no profile"),
            frame,
            (b"EXIF", b"nonsense"),
            (b"XMP ", b"<"),
            (b"ABCD", b"?"),
        ]
        whole = webp_of(*parts)
        for spoilt in (whole, whole[:-3], whole[:4] + b"\xff\0\0\0" + whole[8:], whole + b"more"):
            assert np.array_equal(decoded("WEBP", spoilt), expected)
    for cut in (1, 20, len(data) // 2):
        with pytest.raises(REFUSED):
            decoded("WEBP", webp_of(frame)[: -cut - len(frame[1]) % 2])


def test_a_webp_frame_that_is_smaller_than_its_canvas_lies_on_white():
    canvas = Image.new("RGBA", (64, 48))
    canvas.paste((200, 30, 40, 255), (20, 10, 44, 30))
    second = canvas.copy()
    second.paste((0, 0, 255, 255), (0, 0, 9, 9))
    data = encoded(canvas, "WEBP", save_all=True, append_images=[second], lossless=True)
    expected = np.full((48, 64, 3), 255, np.uint8)
    expected[10:30, 20:44] = (200, 30, 40)
    assert np.array_equal(decoded("WEBP", data), expected)


@pytest.mark.parametrize("order", [1, 3, 6, 8])
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_applied(format_name, order):
    exif = Image.Exif()
    exif[0x0112] = order
    data = encoded(NOISE, format_name, exif=exif)
    turn = {1: 0, 3: 2, 6: 3, 8: 1}[order]
    upright = np.rot90(np.asarray(NOISE), turn)
    got = decoded(format_name, data)
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).mean() < 12


TIFFS = {
    "RGB": (NOISE, {}),
    "lzw": (NOISE, {"compression": "tiff_lzw"}),
    "deflate": (NOISE, {"compression": "tiff_adobe_deflate"}),
    "packbits": (NOISE.convert("L"), {"compression": "packbits"}),
    "fax": (NOISE.convert("1"), {"compression": "group4"}),
    "palette": (NOISE.convert("P"), {}),
    "BigTIFF": (NOISE, {"big_tiff": True}),
    "CMYK": (NOISE.convert("CMYK"), {}),
    "16 bits": (Image.fromarray(np.asarray(NOISE)[..., 0].astype(np.uint16) * 257), {}),
    "floats": (Image.fromarray((np.asarray(NOISE)[..., 0] / 255).astype(np.float32)), {}),
}


@pytest.mark.parametrize(("image", "options"), TIFFS.values(), ids=TIFFS)
def test_tiff(image, options):
    data = encoded(image, "TIFF", software="made by hand", **options)
    expected = np.asarray(NOISE.convert("L").convert("RGB")) if image.mode in ("I;16", "F") else 0
    if image.mode in ("I;16", "F"):
        expected = np.asarray(NOISE)[..., :1].repeat(3, 2)
    else:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decoded("TIFF", data), expected)
    with pytest.raises(REFUSED):
        decoded("TIFF", data[: len(data) // 2])


def test_a_tiff_of_16_bits_in_which_0_is_white():
    values = np.asarray(NOISE)[..., 0].astype(np.uint16) * 257
    data = encoded(Image.fromarray(values), "TIFF")
    at = data.index(struct.pack("<HHIH", 262, 3, 1, 1))
    data = data[: at + 8] + b"\0" + data[at + 9 :]
    assert np.array_equal(decoded("TIFF", data)[..., 0], 255 - np.asarray(NOISE)[..., 0])


@pytest.mark.parametrize("compression", ["packbits", "tiff_lzw"])
def test_a_tiff_whose_last_strip_is_cut_is_refused(compression):
    data = encoded(NOISE, "TIFF", compression=compression, strip_size=140 * 3 * 7)
    page = essence.tiff_page(data)
    kind, _ = essence._tiff_kind(data)
    places = essence._tiff_numbers(data, page[273], kind)
    sizes = essence._tiff_numbers(data, page[279], kind)
    assert len(places) == len(sizes) == 15
    # the page's entries come last: as if the file were cut before its last rows end
    form = "<15I" if struct.pack("<15I", *sizes) in data else "<15H"
    most = 60_000
    longer = data.replace(struct.pack(form, *sizes), struct.pack(form, *sizes[:-1], most))
    assert longer != data
    with pytest.raises(REFUSED):
        decoded("TIFF", longer)


def test_of_a_tiff_the_first_page_that_is_no_thumbnail():
    thumbnail = NOISE.resize((14, 10))
    pages = io.BytesIO()
    thumbnail.save(
        pages, "TIFF", tiffinfo={254: 1}, save_all=True, append_images=[NOISE, thumbnail]
    )
    # Pillow says of each that it is one: of the second it is not
    data = bytearray(pages.getvalue())
    entries = [at for at in range(len(data)) if data[at : at + 8] == b"\xfe\0\4\0\1\0\0\0"]
    if len(entries) > 1:
        data[entries[1] + 8] = 0
    assert np.array_equal(decoded("TIFF", bytes(data)), np.asarray(NOISE))


def test_heic_of_any_kind():
    for image, options in (
        (NOISE, {"quality": 95}),
        (NOISE, {"quality": 95, "chroma": 444}),
        (NOISE.convert("L"), {"quality": 95}),
    ):
        out = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        pillow_heif.from_pillow(image).save(out, exif=exif.tobytes(), **options)
        got = decoded("HEIC", out.getvalue())
        heif = pillow_heif.open_heif(io.BytesIO(out.getvalue()))
        expected = np.asarray(heif.to_pillow().convert("RGB"))
        assert got.shape == expected.shape and np.array_equal(got, expected)


def test_heic_with_alpha_lies_on_white():
    image = NOISE.convert("RGBA")
    image.putalpha(0)
    image.paste((10, 200, 30, 255), (0, 0, 70, 100))
    out = io.BytesIO()
    pillow_heif.from_pillow(image).save(out, quality=-1, chroma=444)
    got = decoded("HEIC", out.getvalue())
    assert (got[:, 80:] > 245).all() and (abs(got[:, :60].astype(int) - (10, 200, 30)) < 12).all()


def test_metadata_of_heic_and_avif_is_no_matter():
    marker = b"II*\0\x08\0\0\0\0\0" + b"QQQQ" * 20
    heic = io.BytesIO()
    pillow_heif.from_pillow(NOISE).save(heic, exif=b"Exif\0\0" + marker, xmp=b"<x" + marker)
    for name, data in (
        ("HEIC", heic.getvalue()),
        ("AVIF", encoded(NOISE, "AVIF", exif=b"Exif\0\0" + marker, xmp=b"<x" + marker)),
    ):
        sound = decoded(name, data)
        assert sound.shape == (100, 140, 3)
        at = data.index(b"QQQQ")
        for spoilt in (
            data[: at - 20] + b"\xff" * 60 + data[at + 40 :],
            data[: at - 20] + bytes(60) + data[at + 40 :],
        ):
            assert np.array_equal(decoded(name, spoilt), sound)


# --- large pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "factor"),
    [
        ((8000, 5000), 1),
        ((8001, 5000), 2),
        ((10_000, 10_000), 3),
        ((65_535, 1500), 3),
        ((20, 5_000_000), 1),
        ((40, 2_500_000), 2),
    ],
)
def test_pictures_of_more_than_40_megapixels_are_made_smaller(size, factor):
    assert reduction(*size, 16) == factor


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "HEIC"])
def test_a_large_picture_is_a_smaller_one_that_looks_the_same(format_name, monkeypatch):
    monkeypatch.setattr(pixels, "WHOLE_PIXELS", 100 * 100)
    monkeypatch.setattr(pixels, "REDUCED_PIXELS", 60 * 60)
    source = NOISE.convert("L") if format_name == "GIF" else NOISE
    got = decoded(format_name, encoded(source, format_name), 16)
    expected = source.convert("RGB").resize(got.shape[1::-1], Image.Resampling.BOX)
    assert got.shape[:2] == (50, 70)
    assert np.abs(got.astype(int) - np.asarray(expected)).mean() < 6


def test_a_large_transparent_picture_lies_on_white_before_it_is_made_smaller(monkeypatch):
    monkeypatch.setattr(pixels, "WHOLE_PIXELS", 100 * 100)
    monkeypatch.setattr(pixels, "REDUCED_PIXELS", 60 * 60)
    values = np.zeros((100, 140, 4), np.uint8)
    values[:, 1::2] = (0, 0, 0, 255)
    got = decoded("PNG", encoded(Image.fromarray(values), "PNG"), 16)
    assert (abs(got.astype(int) - 127) <= 1).all(), "half black, half white"
