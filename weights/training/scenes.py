"""Training examples of the joint model: a target scene, what SigLIP sees of it, and a caption.

Most are icons on plain backgrounds; the input shows the same concept, half the time in another
style and never in quite the same place. The rest are photographs, textures and collages, which
teach that any picture's colours and layout are to be kept. Knows no models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from redux_pipelines.sampling import Grid
from training.augment import (
    Placement,
    compose,
    jitter,
    overlay,
    random_crops,
    random_placement,
    uniform,
)
from training.captions import caption
from training.dataset import Icons
from training.textures import random_textures

_KINDS = (0.8, 0.08, 0.04, 0.08)
"""Shares of icons, photographs, textures and collages."""
_SAME_STYLE = 0.5
_WORDS_IF_SAME = (0.7, 0.15)
_WORDS_IF_OTHER = (0.08, 0.6)
_EMPTY_IS_ENCODED = 0.15


@dataclass(frozen=True, slots=True)
class Examples:
    """B scenes: ``targets (B, 3, H, W)`` and ``inputs (B, 3, S, S)`` in -1…1, captions.

    ``concepts`` are those of the leading icons, the other scenes have none.
    """

    targets: Tensor
    inputs: Tensor
    captions: tuple[str, ...]
    concepts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SceneSource:
    """Draws examples; ``rows`` are the icons it may use, ``input_side`` is SigLIP's, in pixels."""

    icons: Icons
    photos: list[NDArray[np.uint8]]
    rows: NDArray[np.int64]
    input_side: int

    def draw(self, rng: Generator, grid: Grid, cell: int, *, count: int) -> Examples:
        """``count`` examples for a grid of ``cell`` × ``cell`` core pixels per token."""
        height, width = grid.rows * cell, grid.columns * cell
        kinds = rng.multinomial(count, _KINDS)
        icons = self._icons(rng, int(kinds[0]), height, width)
        others = torch.cat(
            [
                self._photographs(rng, int(kinds[1]), height, width),
                random_textures(rng, int(kinds[2]), height, width),
                self._collages(rng, int(kinds[3]), height, width),
            ]
        )
        words = ["photo"] * kinds[1] + ["texture"] * kinds[2] + [""] * kinds[3]
        return Examples(
            targets=torch.cat([icons.targets, others]),
            inputs=torch.cat([icons.inputs, self._shrink(others)]),
            captions=icons.captions + tuple(_plain_caption(rng, word) for word in words),
            concepts=icons.concepts,
        )

    def _icons(self, rng: Generator, count: int, height: int, width: int) -> Examples:
        rows = rng.choice(self.rows, count)
        seen = np.array([self._input_row(rng, int(row)) for row in rows], dtype=np.int64)
        place = random_placement(rng, count)
        side = self.input_side
        return Examples(
            targets=compose(self.icons.pixels[rows], place, height, width),
            inputs=compose(self.icons.pixels[seen], jitter(place, rng, 1.0), side, side),
            captions=tuple(
                self._caption(rng, int(row), int(other))
                for row, other in zip(rows, seen, strict=True)
            ),
            concepts=self.icons.concepts[rows],
        )

    def _input_row(self, rng: Generator, row: int) -> int:
        if rng.random() < _SAME_STYLE:
            return row
        return int(rng.choice(self.icons.rows_of(int(self.icons.concepts[row]))))

    def _caption(self, rng: Generator, row: int, seen: int) -> str:
        style = self.icons.styles[row]
        is_same = style == self.icons.styles[seen]
        name = self.icons.names[self.icons.concepts[row]]
        return caption(rng, style, name, _WORDS_IF_SAME if is_same else _WORDS_IF_OTHER)

    def _photographs(self, rng: Generator, count: int, height: int, width: int) -> Tensor:
        crops = random_crops(rng, self.photos, count, height, width)
        tints = torch.from_numpy(rng.uniform(0.7, 1.1, (count, 3, 1, 1)).astype(np.float32))
        return ((crops + 1) * tints - 1).clamp(-1, 1)

    def _collages(self, rng: Generator, count: int, height: int, width: int) -> Tensor:
        """One to three small icons before a texture or a photograph."""
        behind = random_textures(rng, count, height, width)
        if rng.random() < 0.5:
            behind = self._photographs(rng, count, height, width)
        for _ in range(int(rng.integers(1, 4))):
            place = _scattered(rng, count, height, width)
            behind = overlay(self.icons.pixels[rng.choice(self.rows, count)], place, behind)
        return behind

    def other_views(self, rng: Generator, concepts: NDArray[np.int64]) -> Tensor:
        """Each concept in any style on a new scene, as SigLIP sees it."""
        rows = [int(rng.choice(self.icons.rows_of(int(concept)))) for concept in concepts]
        place = jitter(random_placement(rng, len(rows)), rng, 1.0)
        return compose(self.icons.pixels[rows], place, self.input_side, self.input_side)

    def _shrink(self, scenes: Tensor) -> Tensor:
        size = (self.input_side, self.input_side)
        if len(scenes) == 0:
            return torch.empty(0, 3, *size)
        return F.interpolate(scenes, size, mode="bilinear", antialias=True)


def _scattered(rng: Generator, count: int, height: int, width: int) -> Placement:
    place, shorter = random_placement(rng, count), min(height, width)
    return Placement(
        place.background,
        place.flip,
        uniform(rng, count, 0.3, 0.7),
        uniform(rng, count, -0.8, 0.8) * (width / shorter),
        uniform(rng, count, -0.8, 0.8) * (height / shorter),
        uniform(rng, count, -0.5, 0.5),
    )


def _plain_caption(rng: Generator, style: str) -> str:
    return caption(rng, style, "", (0.7, 0.3)) if style else ""


class Words:
    """Turns captions into the token ids that the two text encoders are given."""

    def __init__(self, clip_tokenizer: Any, t5_tokenizer: Any, longest: int) -> None:
        self._tokenizers = (clip_tokenizer, t5_tokenizer)
        self._longest = longest

    def ids(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """CLIP's and T5's ids, each ``(B, longest)``, padded or cut off."""
        clip_ids, t5_ids = (
            tokenizer(
                list(captions),
                padding="max_length",
                max_length=self._longest,
                truncation=True,
                return_tensors="pt",
                return_attention_mask=False,
            ).input_ids
            for tokenizer in self._tokenizers
        )
        return clip_ids, t5_ids

    @staticmethod
    def are_given(rng: Generator, captions: Sequence[str]) -> Tensor:
        """1 where text is encoded, 0 where zeros stand for it: most but not all empty captions."""
        encoded = rng.random(len(captions)) < _EMPTY_IS_ENCODED
        flags = [bool(words) or bool(flag) for words, flag in zip(captions, encoded, strict=True)]
        return torch.tensor(flags, dtype=torch.float32)
