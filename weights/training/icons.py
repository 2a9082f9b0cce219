"""The icons that the embedded model never saw, from the sheet that its evaluation drew."""

from collections.abc import Iterable

from PIL import Image

from redux_weights.embedded import find_mini

COUNT = 130
"""Of them, each its own concept."""

TILE = 128
"""Pixels a side."""

COLUMNS = 13
"""Of the sheet."""


def held_out(places: Iterable[int] = range(COUNT)) -> list[Image.Image]:
    """Those with these numbers, from 0 to ``COUNT - 1``."""
    with Image.open(find_mini().base.parent / "report" / "inputs.webp") as opened:
        sheet = opened.convert("RGB")
    corners = [(place % COLUMNS * TILE, place // COLUMNS * TILE) for place in places]
    return [sheet.crop((left, top, left + TILE, top + TILE)) for left, top in corners]
