"""From a picture to Redux tokens: SigLIP's last hidden state through the Redux embedder.

Preprocessing is what FLUX.1-Redux was trained with: RGB, squashed to the encoder's square without
regard to its proportions (unless a ``fit`` has some), PIL bicubic, normalised. Size, mean and
deviation come from the checkpoint's ``feature_extractor``. Knows no text and no transformer.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from redux_pipelines.contract.types import Fit, PreprocessedPicture
from redux_pipelines.errors import WeightsError
from redux_pipelines.images.rgb import grey, to_rgb
from redux_pipelines.lru import LRU, digest, tensor_bytes

CACHE_BYTES = 64 * 2**20
"""Ten pictures of FLUX.1-Redux in bfloat16."""

PAPER = (255, 255, 255)
"""What letterboxes are filled with: transparent pictures are seen on it, too."""

LEAST_COVERAGE = 0.5
"""Of a token's square: those with less do not count, those with more do, as if it were all."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a picture becomes the encoder's input: side lengths in pixels, statistics of 0…1 RGB."""

    width: int
    height: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255

    @classmethod
    def read(cls, path: Path) -> "Preprocessing":
        """Read ``preprocessor_config.json``. Raises ``WeightsError`` if it has no square size."""
        config = json.loads(path.read_text())
        try:
            return cls(
                width=int(config["size"]["width"]),
                height=int(config["size"]["height"]),
                mean=tuple(config["image_mean"]),
                std=tuple(config["image_std"]),
                rescale_factor=float(config.get("rescale_factor", 1 / 255)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path} lacks a usable size, image_mean or image_std") from error

    def apply(self, image: Image.Image, fit: Fit = "squash") -> Tensor:
        """Pixels ``(1, 3, height, width)``, float32."""
        rgb = to_rgb(image)
        return self.normalise(frame(rgb, self.frame_of(rgb, fit)))

    def frame_of(self, rgb: Image.Image, fit: Fit) -> "Frame":
        """The frame that ``rgb`` goes into."""
        return Frame(rgb.size, (self.width, self.height), fit)

    def normalise(self, framed: Image.Image) -> Tensor:
        """The pixels of a picture in its frame, as ``apply`` gives them."""
        levels = (np.arange(256).astype(np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(each, np.float32) for each in (self.mean, self.std))
        normal = (levels[:, None] - mean) / std  # of each level in each channel: there are few
        planes = np.asarray(framed).transpose(2, 0, 1)
        return torch.from_numpy(
            np.stack([normal[:, i][plane] for i, plane in enumerate(planes)])[None]
        )


class ImageEncoder:
    """SigLIP vision tower and Redux embedder on one device; tokens of recent pictures are kept.

    ``presence`` is entered for as long as their weights must be there.
    """

    def __init__(
        self,
        siglip: Any,
        embedder: Any,
        preprocessing: Preprocessing,
        presence: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._presence = presence or nullcontext()
        self._siglip = siglip
        self._embedder = embedder
        self._preprocessing = preprocessing
        self.cache: LRU[bytes, Tensor] = LRU(CACHE_BYTES, tensor_bytes)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens, which come row by row: 27 × 27 of FLUX.1-Redux."""
        patch = self._patch
        return self._preprocessing.height // patch, self._preprocessing.width // patch

    def preprocess(
        self,
        picture: Image.Image | PreprocessedPicture,
        fit: Fit = "squash",
        mask: Image.Image | None = None,
    ) -> PreprocessedPicture:
        """What of a picture is encoded, and counts. From any thread.

        One that was preprocessed is returned as it is.
        """
        if isinstance(picture, PreprocessedPicture):
            return picture
        rgb = to_rgb(picture)
        into = self._preprocessing.frame_of(rgb, fit)
        is_whole = mask is None and fit != "letterbox"
        shares = None if is_whole else self._shares(into, mask)
        bare = self._shares(into, None) if fit == "letterbox" else None
        is_narrow = bare is not None and not kept_tokens(bare).any()
        return PreprocessedPicture(frame(rgb, into), shares, is_narrow)

    @torch.inference_mode()
    def encode(self, picture: Image.Image | PreprocessedPicture, fit: Fit = "squash") -> Tensor:
        """Redux tokens ``(N, D)`` of one picture, D the transformer's text width.

        The same for the same preprocessed pixels, and not to be changed.
        """
        pixels = self._preprocessing.normalise(self.preprocess(picture, fit).pixels)
        return self.cache.get(digest(pixels), lambda: self._embed(pixels))

    def _shares(self, into: "Frame", mask: Image.Image | None) -> Image.Image:
        """How much of each token's square is picture, and white in ``mask``."""
        rows, columns = self.grid
        covered = coverage(into, mask)
        # what is left of the encoder's square beside its patches is seen by no token
        patches = covered.crop((0, 0, columns * self._patch, rows * self._patch))
        return patches.resize((columns, rows), Image.Resampling.BOX)

    @property
    def _patch(self) -> int:
        return int(self._siglip.config.patch_size)

    def _embed(self, pixels: Tensor) -> Tensor:
        with self._presence:
            pixels = pixels.to(self._siglip.device, self._siglip.dtype)
            hidden = self._siglip(pixel_values=pixels).last_hidden_state
            tokens: Tensor = self._embedder(hidden).image_embeds[0]
        return tokens


def kept_tokens(coverage: Image.Image) -> Tensor:
    """Which tokens count, on their grid, by how much of the square of each is picture."""
    shares = torch.from_numpy(np.asarray(coverage, np.float64) / 255)
    return shares >= LEAST_COVERAGE


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
    if (left, top, width, height) != (0, 0, *picture.size):
        # a copy: with a box to resize from, what is beyond its edges would show
        picture = picture.crop((left, top, left + width, top + height))
    inner = picture.resize(into.inner, Image.Resampling.BICUBIC)
    return _middle(inner, Image.new("RGB", into.size, PAPER))


def coverage(into: Frame, mask: Image.Image | None = None) -> Image.Image:
    """What counts in the frame, as grey levels: white where there is picture, and ``mask`` white.

    The mask is stretched over the picture, whatever its size, and goes the same way.
    """
    given = Image.new("L", (1, 1), 255) if mask is None else grey(mask)
    inner = given.resize(into.inner, Image.Resampling.BOX, box=into.box(given.size))
    return _middle(inner, Image.new("L", into.size, 0))


def _middle(inner: Image.Image, paper: Image.Image) -> Image.Image:
    """``inner`` in the middle of ``paper``."""
    if inner.size == paper.size:
        return inner
    left, top = (paper.width - inner.width) // 2, (paper.height - inner.height) // 2
    paper.paste(inner, (left, top))
    return paper
