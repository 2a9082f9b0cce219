"""The training pictures on disk and which of them are held out.

``build_icons`` joins the SVG renderings and the bitmap set into one array; ``Icons`` and ``Photos``
read them. Knows where files lie and what a concept is; knows no augmentation and no models.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STYLES = ("noto", "flat", "3d")
HELD_OUT_CONCEPTS = 130
HELD_OUT_SEED = 5
"""Concepts never trained on: the first 130 of ``default_rng(5).permutation(concepts)``."""

TRAINING_PHOTOS = {
    "astronaut.png": "public domain (NASA)",
    "hubble_deep_field.jpg": "public domain (NASA, ESA)",
    "rocket.jpg": "public domain (SpaceX)",
    "camera.png": "CC0 (Lav Varshney)",
    "brick.png": "CC0 (CC0Textures)",
    "grass.png": "CC0 (linolafett)",
    "gravel.png": "CC0 (CC0Textures)",
}
HELD_OUT_PHOTOS = {
    "chelsea.png": "CC0 (Stefan van der Walt)",
    "coffee.png": "CC0 (Rachel Michetti)",
}
"""Photographs of scikit-image's wheel and their licences; the second kind is for evaluation."""

_ARRAY, _INDEX = "icons.u8", "icons.json"


@dataclass(frozen=True)
class Icons:
    """Premultiplied RGBA ``pixels (N, S, S, 4)`` with the style and concept of each picture.

    ``names`` holds one English name per concept; ``held_out`` are concept numbers.
    """

    pixels: NDArray[np.uint8]
    styles: tuple[str, ...]
    concepts: NDArray[np.int64]
    names: tuple[str, ...]
    held_out: frozenset[int]

    @property
    def training_rows(self) -> NDArray[np.int64]:
        """Pictures that may be trained on."""
        return np.flatnonzero(~self._is_held_out())

    @property
    def held_out_rows(self) -> NDArray[np.int64]:
        """Pictures of held-out concepts, in all styles."""
        return np.flatnonzero(self._is_held_out())

    def _is_held_out(self) -> NDArray[np.bool_]:
        return np.isin(self.concepts, sorted(self.held_out))

    def rows_of(self, concept: int) -> list[int]:
        """All pictures of a concept."""
        return self._by_concept[concept]

    @property
    def _by_concept(self) -> list[list[int]]:
        cached: list[list[int]] | None = self.__dict__.get("_rows")
        if cached is None:
            cached = [[] for _ in self.names]
            for row, concept in enumerate(self.concepts.tolist()):
                cached[concept].append(row)
            self.__dict__["_rows"] = cached
        return cached


def choose_held_out(concepts: int, count: int = HELD_OUT_CONCEPTS) -> frozenset[int]:
    """The concepts to hold out, the same on every machine."""
    order = np.random.default_rng(HELD_OUT_SEED).permutation(concepts)
    return frozenset(order[:count].tolist())


def build_icons(rendered: Path, bitmaps: Path, out: Path) -> None:
    """Write ``out/icons.u8`` and ``out/icons.json`` from render.mjs's output and a WebP folder."""
    index = json.loads((rendered / "svg.json").read_text())
    side, drawings = index["side"], index["pictures"]
    straight = np.memmap(rendered / "svg.rgba", np.uint8, "r", shape=(drawings, side, side, 4))
    rows = [
        (concept, style, source)
        for concept, entry in enumerate(index["concepts"])
        for style, source in entry["styles"].items()
    ]
    shape = (len(rows), side, side, 4)
    pixels = np.memmap(out / _ARRAY, np.uint8, "w+", shape=shape)
    for row, (_, _, source) in enumerate(rows):
        picture = straight[source] if isinstance(source, int) else _bitmap(bitmaps / source, side)
        pixels[row] = premultiply(picture)
    pixels.flush()
    meta = {
        "side": side,
        "rows": [[concept, style] for concept, style, _ in rows],
        "names": [entry["name"].replace("-", " ") for entry in index["concepts"]],
    }
    (out / _INDEX).write_text(json.dumps(meta))


def _bitmap(path: Path, side: int) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGBA").resize((side, side)))


def premultiply(straight: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGBA with colours times alpha, so that resampling does not bleed hidden colours."""
    wide = straight.astype(np.uint16)
    wide[..., :3] = (wide[..., :3] * wide[..., 3:] + 127) // 255
    return wide.astype(np.uint8)


def load_icons(folder: Path, held_out: int = HELD_OUT_CONCEPTS) -> Icons:
    """The icons that ``build_icons`` wrote; pixels stay on disk until they are read."""
    meta = json.loads((folder / _INDEX).read_text())
    side, rows = meta["side"], meta["rows"]
    pixels = np.memmap(folder / _ARRAY, np.uint8, "r", shape=(len(rows), side, side, 4))
    return Icons(
        pixels=pixels,
        styles=tuple(style for _, style in rows),
        concepts=np.array([concept for concept, _ in rows]),
        names=tuple(meta["names"]),
        held_out=choose_held_out(len(meta["names"]), held_out),
    )


def load_large(
    folder: Path, held_out: int = HELD_OUT_CONCEPTS
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Large drawings to train on, and those of held-out concepts: ``(N, S, S, 4)`` each.

    Premultiplied; all of them are read into memory.
    """
    index = json.loads((folder / "svg.json").read_text())
    side, concepts = index["side"], index["concepts"]
    shape = (index["pictures"], side, side, 4)
    straight = np.memmap(folder / "svg.rgba", np.uint8, "r", shape=shape)
    without = choose_held_out(len(concepts), held_out)
    is_held_out = np.zeros(len(straight), bool)
    for number, concept in enumerate(concepts):
        drawn = [source for source in concept["styles"].values() if isinstance(source, int)]
        is_held_out[drawn] = number in without
    pixels = np.stack([premultiply(picture) for picture in straight])
    return pixels[~is_held_out], pixels[is_held_out]


def load_photos(folder: Path, names: Sequence[str]) -> list[NDArray[np.uint8]]:
    """RGB photographs ``(H, W, 3)``; the grey ones among them are read as RGB too."""
    photos = []
    for name in names:
        with Image.open(folder / name) as image:
            photos.append(np.asarray(image.convert("RGB")))
    return photos
