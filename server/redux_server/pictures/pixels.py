"""From the essence of a picture's file to rows of opaque sRGB, upright, on white, in strips.

Whole pictures are decoded once and never copied whole, unless they have to be turned. Large ones
are made smaller on the way. Runs confined, in the process that decodes: what is imported late is
imported before by ``decode_child``. Knows no process and no message.
"""

import io
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageChops, ImageFile

from redux_pipelines.images.rgb import eight_bits, opaque_rgb, white_level
from redux_server.pictures.essence import (
    MAX_PROFILE_BYTES,
    Canvas,
    Essence,
    essence,
    jpeg_scans_are_complete,
    orientation_of,
    png_rows_alone,
)

if TYPE_CHECKING:
    from redux_server.pictures.colours import Convert

STRIP_BYTES = 2**20
"""About what a strip has in RGB."""
WHOLE_PIXELS = 40_000_000
"""Pictures of more are made smaller, to no more than ``REDUCED_PIXELS``."""
REDUCED_PIXELS = 16_000_000
"""4000 times 4000: ten times a side what an encoder is shown, 384."""
DECODER_THREADS = 2
_DCT_SCALES = (8, 4, 2, 1)  # what a JPEG's decoder can divide by
# Their decoders hold canvases as large as the picture for as long as it is open.
_HOLD_CANVASES = ("AVIF", "WEBP")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What would show in the place of a JPEG's missing blocks: no marker, but each restart's.
_JUNK = bytes((73 * each + 41) % 251 for each in range(997))
_FILLING = _JUNK + 2 * b"".join(bytes((0xFF, 0xD0 + each)) + _JUNK for each in range(8))

Check = Callable[[int, int], None]
"""Called with width and height before there are any pixels; raises if they are not to be."""
Strip = Callable[[int, int], Image.Image]
"""The rows from one up to another."""


def srgb_strips(format_name: str, data: bytes, check: Check, min_side: int = 1) -> Iterator[Any]:
    """The size of the picture that comes, and then its rows in strips of RGB.

    No side becomes shorter than ``min_side`` where it is made smaller.

    Raises:
        Exception: of any kind, what ``check`` raises among them; the picture cannot be had.
    """
    told = essence(format_name, data)
    del data
    size, orientation, strips = _opened(format_name, told, check, min_side)
    del told
    turn = _TURNS.get(orientation)
    if turn is None:
        yield size
        yield from strips
        return
    whole, top = Image.new("RGB", size), 0
    for strip in strips:  # at the end of which the decoded picture is no longer held
        whole.paste(strip, (0, top))
        top += strip.height
    whole = whole.transpose(turn)
    yield whole.size
    rows = max(1, STRIP_BYTES // (3 * whole.width))
    for top in range(0, whole.height, rows):
        yield whole.crop((0, top, whole.width, min(top + rows, whole.height)))


def _opened(
    format_name: str, told: Essence, check: Check, min_side: int
) -> tuple[tuple[int, int], int, Iterator[Image.Image]]:
    """Size, orientation and strips of the picture as it lies in the file."""
    if format_name == "HEIC":
        told, size, mode, rows_of = _heic(told, check)
        factor, white = reduction(*size, min_side), None
    else:
        image, factor = _loaded(format_name, told, check, min_side)
        told = told._replace(
            data=b"",
            orientation=told.orientation or _orientation(image),
            profile=told.profile or (_profile(image) if format_name == "AVIF" else b""),
        )
        size, mode, white = image.size, image.mode, white_level(image)
        rows_of = _rows(image)
        if told.is_inverted and mode.startswith("I;16"):
            rows_of = _inverted(rows_of)
        del image
    canvas = told.canvas or Canvas(*size, 0, 0)
    to_rgb = _to_rgb(mode, white, told)
    strips = _strips(canvas, size, factor, lambda top, end: to_rgb(rows_of(top, end)))
    reduced = -(-canvas.width // factor), -(-canvas.height // factor)
    return reduced, told.orientation, strips


def reduction(width: int, height: int, min_side: int) -> int:
    """By how much each side of such a picture is divided; 1 of one that is not too large."""
    factor, most = 1, max(1, min(width, height) // max(1, min_side))
    if width * height > WHOLE_PIXELS:
        while factor < most and width * height > REDUCED_PIXELS * factor**2:
            factor += 1
    return factor


def _strips(
    canvas: Canvas, size: tuple[int, int], factor: int, rgb: Strip
) -> Iterator[Image.Image]:
    """The canvas from top to bottom; ``rgb`` has the rows of what lies on it."""
    rows = max(1, STRIP_BYTES // (3 * canvas.width))
    rows = -(-rows // factor) * factor
    covers = canvas == Canvas(*size, 0, 0)
    for top in range(0, canvas.height, rows):
        end = min(top + rows, canvas.height)
        if covers:
            strip = rgb(top, end)
        else:
            strip = Image.new("RGB", (canvas.width, end - top), (255, 255, 255))
            first, last = max(0, top - canvas.top), min(size[1], end - canvas.top)
            if first < last:
                strip.paste(rgb(first, last), (canvas.left, first + canvas.top - top))
        yield strip.reduce(factor) if factor > 1 else strip


# --- decoding -------------------------------------------------------------------------------------


def _loaded(
    format_name: str, told: Essence, check: Check, min_side: int
) -> tuple[Image.Image, int]:
    """The decoded picture, and by how much its sides are still to be divided."""
    opened = Image.open(io.BytesIO(told.data), formats=[format_name])
    width, height = told.canvas[:2] if told.canvas else opened.size
    check(width, height)
    check(*opened.size) if not told.canvas else _check_frame(opened.size, width, height)
    factor = reduction(width, height, min_side)
    scale = 1
    if format_name == "JPEG" and factor > 1:
        most = min(width, height) // min_side
        fitting = [each for each in _DCT_SCALES if each >= factor and each <= most]
        scale, factor = min(fitting, default=1), 1 if fitting else factor
    try:
        image = _load(format_name, told.data, scale)
    except (OSError, SyntaxError, ValueError, EOFError):
        image = _load_without_end(format_name, told.data, scale)
    if format_name in _HOLD_CANVASES:
        image = image.copy()
    if format_name == "BMP" and image.mode == "RGBA" and image.getchannel("A").getbbox() is None:
        image.putalpha(255)  # unused, say Windows and browsers
    if format_name == "PNG" and _lacks_rows(image, told.data):
        raise ValueError("rows are missing")
    if told.transparent_16 and image.mode == "RGB":
        image = _keyed(image, told)
    return image, factor


def _lacks_rows(image: Image.Image, png: bytes) -> bool:
    """Whether there are fewer than the PNG says, which its decoder leaves black without a word."""
    last = image.crop((0, image.height - 1, image.width, image.height))
    is_doubtful = png[28] == 1 or last.getbbox(alpha_only=False) is None  # by passes, or black
    return is_doubtful and png_rows_alone(png) is None


def _check_frame(size: tuple[int, int], width: int, height: int) -> None:
    if size[0] > width or size[1] > height:
        raise ValueError("a frame that is larger than its screen")


def _load(format_name: str, data: bytes, scale: int = 1) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=[format_name])
    if scale > 1:
        image.draft("", (image.width // scale, image.height // scale))
    image.load()
    return image


def _load_without_end(format_name: str, data: bytes, scale: int) -> Image.Image:
    """A picture that lacks nothing but the mark of its end, or a checksum there.

    Browsers show these whole. Raises ``ValueError`` if any pixel is missing.
    """
    rows = png_rows_alone(data) if format_name == "PNG" else None
    if rows is not None:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            return _load("PNG", rows)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
    if format_name == "JPEG" and jpeg_scans_are_complete(data):
        data = data.rstrip(b"\xff")
        filled = _sums(_load("JPEG", data + _FILLING + b"\xff\xd9", scale))
        image = _load("JPEG", data + b"\xff\xd9", scale)
        if filled == _sums(image):  # nothing behind the end is a part of the picture
            return image
    raise ValueError("pixels are missing")


def _sums(image: Image.Image) -> list[int]:
    rows = max(1, STRIP_BYTES // (4 * image.width))
    return [
        zlib.crc32(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
        for top in range(0, image.height, rows)
    ]


def _keyed(image: Image.Image, told: Essence) -> Image.Image:
    """With the one transparent colour of 16 bits, of which ``image`` has the higher eight."""
    assert told.transparent_16
    lower = Image.open(io.BytesIO(told.data), formats=["PNG"])
    lower.tile = [each._replace(args="RGB;16L") for each in lower.tile]  # the second bytes first
    lower.load()
    mask = Image.new("L", image.size, 255)
    for half, shift in ((image, 8), (lower, 0)):
        for channel, value in zip(half.split(), told.transparent_16, strict=True):
            wanted = value >> shift & 0xFF
            same = channel.point([255 * (level == wanted) for level in range(256)])
            mask = ImageChops.darker(mask, same)
    image.putalpha(ImageChops.invert(mask))
    return image


def _orientation(image: Image.Image) -> int:
    """What the decoder of AVIF makes EXIF of: how the file says that it is to be turned."""
    exif = image.info.get("exif")
    return orientation_of(exif) if isinstance(exif, bytes) else 1


def _profile(image: Any) -> bytes:
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) and len(profile) <= MAX_PROFILE_BYTES else b""


def _rows(image: Image.Image) -> Strip:
    return lambda top, end: image.crop((0, top, image.width, end))


def _heic(told: Essence, check: Check) -> tuple[Essence, tuple[int, int], str, Strip]:
    """By libheif, whose own rows are cut into strips: Pillow's would be a copy of all of them."""
    import pillow_heif

    options = vars(pillow_heif.options)
    options.update(
        DECODE_THREADS=DECODER_THREADS, THUMBNAILS=False, DEPTH_IMAGES=False, AUX_IMAGES=False
    )
    picture = pillow_heif.open_heif(told.data, convert_hdr_to_8bit=True, remove_stride=False)
    check(*picture.size)
    data, size, mode, stride = picture.data, picture.size, picture.mode, picture.stride
    told = told._replace(data=b"", orientation=1, profile=_profile(picture))
    del picture

    def rows(top: int, end: int) -> Image.Image:
        part = data[top * stride : end * stride]
        return Image.frombytes(mode, (size[0], end - top), part, "raw", mode, stride)

    return told, size, mode, rows


# --- colours --------------------------------------------------------------------------------------


def _inverted(rows_of: Strip) -> Strip:
    return lambda top, end: ImageChops.invert(eight_bits(rows_of(top, end)))


def _to_rgb(mode: str, white: float | None, told: Essence) -> Callable[[Image.Image], Image.Image]:
    """How a strip of pixels of ``mode`` becomes opaque sRGB."""
    found = None
    if "redux_server.pictures.colours" in sys.modules:  # imported where a file may need it
        from redux_server.pictures.colours import conversion

        base = "L" if told.is_grey else _base_mode(mode)
        found = conversion(base, told.profile, told.numbers)
    if found is None:
        return lambda strip: opaque_rgb(strip, white)
    wanted, convert = found
    return lambda strip: _converted(eight_bits(strip, white), wanted, convert)


def _base_mode(mode: str) -> str:
    """Of what kind the colours of a mode are, without alpha and palette."""
    if mode in ("CMYK", "LAB"):
        return mode
    return "L" if mode[0] in ("1", "I", "F") or mode in ("L", "LA", "La") else "RGB"


def _converted(strip: Image.Image, mode: str, convert: "Convert") -> Image.Image:
    alpha = None
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        alpha = strip.getchannel("A")
        strip = strip.convert("RGB")
    rgb = convert(strip if strip.mode == mode else strip.convert(mode))
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return opaque_rgb(rgb)
