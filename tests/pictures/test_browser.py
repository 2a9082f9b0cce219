"""A handful of the corpus as Chromium shows it: the third word on what is right."""

from collections.abc import Iterator
from typing import Any

import pytest

from pictures.browser import chromium_page, shown_in
from pictures.case import Skip, Within
from pictures.check import compare
from pictures.corpus import corpus

# Chromium 156 does not turn a WebP by its EXIF, and shows no GIF whose control extension is short.
CASES = (
    "png/kinds/grey-2-adam7", "png/kinds/grey-alpha-16", "png/trns/rgb-16-by-the-low-byte",
    "png/icc/display-p3-v4", "png/icc/swapped-rgba-8", "png/icc/grey-1.8-grey-8",
    "png/numbers/cicp-over-all", "png/numbers/srgb-over-gama-and-chrm",
    "png/exif/6-II-rgb-8", "png/checksum/tEXt", "png/checksum/iCCP", "png/end/none",
    "png/apng/numbers-wrong", "png/metadata-broken/zTXt-cut", "png/broken/rows-checksum",
    "jpeg/exif/5-MM", "jpeg/exif/7-without-jfif", "jpeg/icc/swapped-v2-in-parts",
    "jpeg/icc-broken/a-part-lacks", "jpeg/cmyk/adobe-inverted", "jpeg/cmyk/without-marker",
    "jpeg/cmyk/ycck", "jpeg/metadata/app0-short", "jpeg/end/behind",
    "gif/screen/at-5-9-background-3", "gif/screen/at-20-10-background-0-transparent",
    "gif/animation/disposal-2", "gif/local-8-interlaced",
    "bmp/header-12/palette-4", "bmp/header-64/palette-8", "bmp/header-40/unused-0",
    "bmp/header-124/alpha", "bmp/header-40/masks-565", "bmp/rle4/mixed",
    "webp/icc/swapped-v4", "webp/animation/small-frame-red",
    "avif/turned/1-None", "avif/turned/3-1", "avif/exif/6-is-not-heeded",
)  # fmt: skip


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    try:
        with chromium_page() as found:
            yield found
    except Skip as missing:
        pytest.skip(str(missing))


@pytest.mark.pictures
@pytest.mark.parametrize("name", CASES)
def test_chromium_shows_the_same(page: Any, name: str) -> None:
    case = corpus()[name]
    try:
        made = case.make()
    except Skip as missing:
        pytest.skip(str(missing))
    shown = shown_in(page, case.family, made.data)
    assert shown is not None, "Chromium shows nothing"
    assert made.expected is not None
    # It lays on white in another order of rounding.
    compare(shown, made.expected, Within(max(3, made.within.most), max(1, made.within.mean)))
