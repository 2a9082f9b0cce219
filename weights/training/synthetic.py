"""A toy set of icons drawn by formulas, for smoke runs without downloads. Knows no models."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.dataset import HELD_OUT_PHOTOS, STYLES, TRAINING_PHOTOS, premultiply

_SHAPES = ("disc", "ring", "square", "diamond", "cross", "bar")
_COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220)}


def write_icons(folder: Path, side: int = 64) -> None:
    """Write ``icons.u8`` and ``icons.json``: 18 concepts, each in all three styles."""
    folder.mkdir(parents=True, exist_ok=True)
    looks = [(colour, shape) for colour in _COLOURS for shape in _SHAPES]
    names = [" ".join(look) for look in looks]
    rows = [(concept, style) for concept in range(len(names)) for style in STYLES]
    pictures = [_draw(*looks[concept], style, side) for concept, style in rows]
    premultiply(np.stack(pictures)).tofile(folder / "icons.u8")
    meta = {"side": side, "rows": rows, "names": names}
    (folder / "icons.json").write_text(json.dumps(meta))


def _draw(colour: str, shape: str, style: str, side: int) -> NDArray[np.uint8]:
    """RGBA ``(side, side, 4)``; the styles differ in outline and shading."""
    y, x = np.mgrid[0:side, 0:side] / side * 2 - 1
    distance = {
        "disc": np.hypot(x, y),
        "ring": np.abs(np.hypot(x, y) - 0.6) * 3,
        "square": np.maximum(np.abs(x), np.abs(y)),
        "diamond": (np.abs(x) + np.abs(y)) * 0.8,
        "cross": np.minimum(np.abs(x), np.abs(y)) * 3,
        "bar": np.maximum(np.abs(x) * 0.9, np.abs(y) * 2.5),
    }[shape]
    picture = np.zeros((side, side, 4))
    picture[..., :3] = _COLOURS[colour]
    if style == "3d":
        picture[..., :3] *= (1.1 - 0.4 * (x + y))[..., None].clip(0.3, 1.15)
    if style == "noto":
        picture[distance > 0.65, :3] = 30
    picture[..., 3] = 255 * (distance < 0.8)
    return picture.clip(0, 255).astype(np.uint8)


def write_photos(folder: Path, side: int = 160) -> None:
    """Write smooth noise under the names of the real photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in (*TRAINING_PHOTOS, *HELD_OUT_PHOTOS):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / name)
