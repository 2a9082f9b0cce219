"""Contact sheets: labelled rows of pictures as one image. Knows nothing of what they show."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

_INK, _PAPER, _MARGIN, _GAP = "#303030", "#e4e4e4", 88, 4
_QUALITY, _TILE_QUALITY = 82, 92


@dataclass(frozen=True, slots=True)
class Row:
    """Pictures to lie side by side, and what they are."""

    label: str
    images: Sequence[Image.Image]


def save_contact_sheet(
    rows: Sequence[Row], path: Path, *, columns: int = 12, tile: tuple[int, int] = (112, 112)
) -> None:
    """Write ``rows`` as a JPEG; longer ones are cut into bands, each with a part of every row.

    ``tile`` is width and height in pixels; pictures of other shapes are fitted inside.
    """
    bands = range(0, max(len(row.images) for row in rows), columns)
    width, height = tile[0] + _GAP, tile[1] + _GAP
    band_height = len(rows) * height + 2 * _GAP
    sheet = Image.new("RGB", (_MARGIN + columns * width, len(bands) * band_height), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for band, first in enumerate(bands):
        for line, row in enumerate(rows):
            top = band * band_height + line * height + _GAP
            draw.multiline_text((6, top + 4), row.label, _INK, font)
            for column, image in enumerate(row.images[first : first + columns]):
                fitted = ImageOps.contain(image.convert("RGB"), tile, Image.Resampling.LANCZOS)
                left = _MARGIN + column * width + (tile[0] - fitted.width) // 2
                sheet.paste(fitted, (left, top + (tile[1] - fitted.height) // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=_QUALITY)


def save_tiles(images: Sequence[Image.Image], path: Path, *, columns: int, side: int) -> None:
    """Write squares of ``side`` pixels, row by row without gaps, as one WebP to be cut up again."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for index, image in enumerate(images):
        tile = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(tile, (index % columns * side, index // columns * side))
    sheet.save(path, quality=_TILE_QUALITY, method=6)
