"""Pictures at the edges of a pipeline: any PIL image to RGB, and RGB to PNG with provenance.

PIL, and numpy for pictures of more than 8 bits a channel: it is imported only then, because the
process that decodes strangers' pictures starts for each of them and must start fast. Knows no
network and no file or web address.
"""

import io
from collections.abc import Mapping
from math import isfinite
from xml.sax.saxutils import quoteattr

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from redux_pipelines.errors import ImageError

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for "created by a trained algorithm", which tools look for in XMP."""

_PNG_COMPRESSION = 1
# 1024² on one core: level 1 takes 0.06-0.11 s; level 4 doubles that for 13-16 % smaller files,
# level 6 takes up to 0.35 s for another 0-4 %.

_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType={source_type}/>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright, opaque, 8-bit RGB copy without metadata; a picture that is so already, itself.

    The EXIF orientation is applied, transparency is flattened onto white. 16-bit values are scaled
    down; 32-bit integers too if any exceeds 255; floats are 0…1 unless any exceeds 1, else 0…255.
    Of an animation the current frame is taken. Raises ``ImageError`` for pixels that cannot be
    decoded.
    """
    if image.mode == "RGB" and is_bare(image):
        return image
    try:
        image.load()
        rgb = opaque_rgb(_upright(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"the picture cannot be decoded: {error}") from error
    rgb.info = {}
    return rgb


def is_bare(image: Image.Image) -> bool:
    """Whether it is pixels alone: of no file any more, and with no word on how to see them."""
    return type(image) is Image.Image and not image.info


def grey(image: Image.Image) -> Image.Image:
    """The grey levels of ``to_rgb``, mode ``L``; a picture that is so already, itself."""
    return image if image.mode == "L" and is_bare(image) else to_rgb(image).convert("L")


def opaque_rgb(image: Image.Image, white: float | None = None) -> Image.Image:
    """What ``to_rgb`` makes of the pixels, which are loaded, wherever up is.

    Pixel by pixel, so that a picture can be had in parts: of mode ``I`` or ``F`` each with the
    ``white_level`` of the whole. One that is RGB already is returned as it is.
    """
    return _flatten(eight_bits(image, white))


def encode_png(image: Image.Image, provenance: Mapping[str, str]) -> bytes:
    """PNG bytes that say the picture is AI generated.

    Each pair of ``provenance`` becomes a text chunk (keys: 1–79 Latin-1 characters). An XMP packet
    states IPTC's digital source type, and a text chunk ``AI-Generated: true`` says it in words.
    """
    chunks = PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", xmp_packet())
    for key, value in {"AI-Generated": "true", **provenance}.items():
        chunks.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks, compress_level=_PNG_COMPRESSION)
    return buffer.getvalue()


def xmp_packet() -> str:
    """XMP that states IPTC's digital source type."""
    return _XMP.format(source_type=quoteattr(DIGITAL_SOURCE_TYPE))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError):  # broken EXIF, sound pixels
        return image.copy()


def white_level(image: Image.Image) -> float | None:
    """What is white in a picture of mode ``I`` or ``F``, by its largest value; else None."""
    if image.mode not in ("I", "F"):
        return None
    most = image.getextrema()[1]
    assert not isinstance(most, tuple)  # one channel
    if image.mode == "I":
        return 65535 if most > 255 else 255
    if isfinite(most):
        return 255 if most > 1 else 1
    import numpy as np

    return 255 if np.nan_to_num(np.asarray(image)).max() > 1 else 1


def eight_bits(image: Image.Image, white: float | None = None) -> Image.Image:
    """Modes with more than 8 bits a channel as ``L``, or ``LA``; others as they are.

    ``white`` is the ``white_level`` of the picture that ``image`` is a part of.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    import numpy as np

    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    white = white or white_level(image) or 65535
    levels = (values * (255 / white)).round().clip(0, 255)
    grey = Image.fromarray(levels.astype("uint8"))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype("uint8")))
    return grey


def _flatten(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle ``width`` × ``height`` pixels; the picture itself where nothing is to be cut."""
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
