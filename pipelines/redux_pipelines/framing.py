"""How a picture of any shape is put into the square that the image encoder sees.

A mask goes the same way as the picture that it belongs to. PIL only. Knows no tokens.
"""

from typing import NamedTuple

from PIL import Image

from redux_pipelines.images import to_rgb
from redux_pipelines.types import Fit

PAPER = (255, 255, 255)
"""What letterboxes are filled with: transparent pictures are seen on it, too."""

Box = tuple[float, float, float, float]


class Frame(NamedTuple):
    """A picture of ``source`` width and height becomes one of ``size``.

    ``squash`` gives up its proportions, ``center`` what is beyond the middle, ``letterbox`` room.
    For a picture of the shape of ``size`` they are the same.
    """

    source: tuple[int, int]
    size: tuple[int, int]
    fit: Fit

    @property
    def seen(self) -> tuple[float, float]:
        """Width and height of the part of the source that is used, around its middle."""
        if self.fit != "center":
            return self.source
        scale = min(self.source[0] / self.size[0], self.source[1] / self.size[1])
        return self.size[0] * scale, self.size[1] * scale

    @property
    def inner(self) -> tuple[int, int]:
        """Width and height of the part of the result that shows it, around its middle."""
        if self.fit != "letterbox":
            return self.size
        scale = min(self.size[0] / self.source[0], self.size[1] / self.source[1])
        return max(1, round(self.source[0] * scale)), max(1, round(self.source[1] * scale))

    def box(self, size: tuple[int, int]) -> Box:
        """``seen`` as a part of a picture of ``size`` that is stretched over the source."""
        left, top = (
            (whole - part) / 2 * given / whole
            for whole, part, given in zip(self.source, self.seen, size, strict=True)
        )
        return left, top, size[0] - left, size[1] - top


def frame(picture: Image.Image, into: Frame) -> Image.Image:
    """An RGB picture in its frame, by PIL's bicubic resampling."""
    left, top, *_ = map(round, into.box(picture.size))
    width, height = (max(1, round(part)) for part in into.seen)
    seen = picture.crop((left, top, left + width, top + height))  # else its edges would show
    inner = seen.resize(into.inner, Image.Resampling.BICUBIC)
    return _middle(inner, Image.new("RGB", into.size, PAPER))


def coverage(into: Frame, mask: Image.Image | None = None) -> Image.Image:
    """What counts in the frame, as grey levels: white where there is picture, and ``mask`` white.

    The mask is stretched over the picture, whatever its size.
    """
    given = Image.new("L", (1, 1), 255) if mask is None else to_rgb(mask).convert("L")
    inner = given.resize(into.inner, Image.Resampling.BOX, box=into.box(given.size))
    return _middle(inner, Image.new("L", into.size, 0))


def _middle(inner: Image.Image, paper: Image.Image) -> Image.Image:
    """``inner`` in the middle of ``paper``."""
    if inner.size == paper.size:
        return inner
    left, top = (paper.width - inner.width) // 2, (paper.height - inner.height) // 2
    paper.paste(inner, (left, top))
    return paper
