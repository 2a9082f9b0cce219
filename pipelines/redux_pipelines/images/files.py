"""Finished images as files of the kind asked for, each saying that it is AI generated.

The same pixels and words are the same bytes. Knows no file and no web address.
"""

import io
from collections.abc import Mapping

from PIL import ExifTags, Image

from redux_pipelines.contract.types import OutputFormat
from redux_pipelines.images.rgb import encode_png, xmp_packet

JPEG_QUALITY = 95
WEBP_QUALITY = 90

_OPTIONS: dict[OutputFormat, dict[str, object]] = {
    "jpeg": {"quality": JPEG_QUALITY, "subsampling": "4:4:4"},
    "webp": {"quality": WEBP_QUALITY, "method": 4},
}


def encode(image: Image.Image, provenance: Mapping[str, str], kind: OutputFormat = "png") -> bytes:
    """A PNG without loss, or a JPEG or WebP that is hardly told from it.

    ``provenance`` are PNG's text chunks, or ``Key: value`` lines in EXIF's image description, in
    ASCII; its ``Software`` is EXIF's too. XMP states IPTC's digital source type in each.
    """
    if kind == "png":
        return encode_png(image, provenance)
    lines = {"AI-Generated": "true", **provenance}
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "\n".join(f"{key}: {lines[key]}" for key in lines)
    if "Software" in provenance:
        exif[ExifTags.Base.Software] = provenance["Software"]
    buffer = io.BytesIO()
    image.save(buffer, kind.upper(), exif=exif, xmp=xmp_packet().encode(), **_OPTIONS[kind])
    return buffer.getvalue()
