"""All cases, and the few of them that the quick tests run."""

from functools import cache

from pictures import (
    bmp_cases,
    gif_cases,
    heif_cases,
    jpeg_cases,
    other_cases,
    png_cases,
    tiff_cases,
    webp_cases,
)
from pictures.case import Case, unique

FORMATS = (
    png_cases, jpeg_cases, gif_cases, bmp_cases, webp_cases, tiff_cases, heif_cases, other_cases,
)  # fmt: skip
QUICK = (
    "png/kinds/grey-2-adam7", "png/trns/rgb-16-by-the-low-byte", "png/icc/display-p3-v4",
    "png/numbers/srgb-over-gama-and-chrm", "png/exif/6-II-rgb-8", "png/checksum/tEXt",
    "png/apng/numbers-wrong", "png/end/none", "png/broken/cut-at-60-percent",
    "jpeg/pillow/2-progressive", "jpeg/exif/5-MM", "jpeg/cmyk/adobe-inverted-icc",
    "jpeg/end/no-end", "jpeg/broken/cut-at-60-percent", "gif/screen/at-5-9-background-3",
    "bmp/header-40/unused-0", "tiff/compression/lzw-2-8-MM", "tiff/orientation/7-II",
    "other/svg", "bomb/tiff-60000",
)  # fmt: skip
"""None of these needs another encoder or decoder."""


@cache
def corpus() -> dict[str, Case]:
    """By name, in the order of the formats."""
    cases = unique(case for module in FORMATS for case in module.cases())
    return {case.name: case for case in cases}
