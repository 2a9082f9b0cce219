"""What a model is measured by: retrieval, likeness, what words, guidance and seeds do, drift.

Everything goes through the product's ``Pipeline``, so that any variant of it (a dtype, fewer steps,
a step cache) is measured the same way. Knows the icons and the product's interface; no training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import SiglipVisionModel

from redux_pipelines.contract.types import GenerationRequest, Pipeline, Result
from redux_pipelines.images.safety import DEFAULT_THRESHOLD, OpenNsfwChecker
from training import metrics
from training.augment import compose, plain
from training.captions import STYLE_WORDS
from training.dataset import STYLES, Icons
from training.probe import Gallery

_INPUT_SIDE = 256
_LAYOUT = 8
_THUMBNAIL = 32


@dataclass(frozen=True)
class Pictures:
    """The safety checker's scores of what was generated so far, with what was asked for."""

    checker: OpenNsfwChecker = field(default_factory=OpenNsfwChecker)
    scores: list[tuple[float, str]] = field(default_factory=list)

    def add(self, request: GenerationRequest, image: Image.Image) -> None:
        """Score one more."""
        asked = (
            f"{request.width}x{request.height}, seed {request.seed}, {request.num_inference_steps} "
            f"steps, guidance {request.guidance_scale:g}, prompt {request.prompt!r}"
        )
        self.scores.append((self.checker.scores([image])[0], asked))

    def verdict(self) -> dict[str, Any]:
        """How many there were, the highest score, and which ones the product would withhold."""
        flagged = [asked for score, asked in self.scores if score >= DEFAULT_THRESHOLD]
        return {
            "images": len(self.scores),
            "flags": len(flagged),
            "highest": max(score for score, _ in self.scores),
            "flagged": flagged,
        }


@dataclass(frozen=True)
class Bench:
    """What is measured with: a pipeline, the icons and ``images`` of held-out ones on white.

    ``rows`` are the icons' numbers. All that is generated is ``seen`` by the safety checker.
    """

    pipeline: Pipeline
    icons: Icons
    rows: list[int]
    images: list[Image.Image]
    steps: int
    seen: Pictures

    @property
    def concepts(self) -> NDArray[np.int64]:
        """The concept of each image."""
        return self.icons.concepts[self.rows]

    def vary(self, images: Sequence[Image.Image], **options: Any) -> list[Image.Image]:
        """One variation of each image; ``options`` are a request's."""
        settings = {"num_inference_steps": self.steps, **options}
        return [self._generate(GenerationRequest(image, **settings)) for image in images]

    def _generate(self, request: GenerationRequest) -> Image.Image:
        *_, last = self.pipeline.generate(request)
        if not isinstance(last, Result):
            raise RuntimeError("the pipeline ended without a result")
        self.seen.add(request, last.images[0])
        return last.images[0]


def make_bench(pipeline: Pipeline, icons: Icons, count: int, steps: int) -> Bench:
    """``count`` held-out icons, at most one per concept as far as there are enough concepts."""
    order = np.random.default_rng(3).permutation(icons.held_out_rows)
    firsts = {int(icons.concepts[row]): int(row) for row in order[::-1]}
    rows = list(firsts.values())[:count]
    return Bench(pipeline, icons, rows, draw_icons(icons, rows), steps, Pictures())


def draw_icons(icons: Icons, rows: Sequence[int]) -> list[Image.Image]:
    """Icons as someone would upload them: 256 pixels, on white."""
    drawn = compose(icons.pixels[list(rows)], plain(len(rows)), _INPUT_SIDE, _INPUT_SIDE)
    return metrics.to_images(drawn)


class EncoderSpace:
    """All icons as mean SigLIP features of the model's encoder, centred."""

    def __init__(self, redux: Path, icons: Icons) -> None:
        encoder: Any = SiglipVisionModel.from_pretrained(redux / "image_encoder")
        self._encoder, self._side = encoder.float().eval(), int(encoder.config.image_size)
        self._concepts = icons.concepts
        chunks = np.array_split(np.arange(len(icons.pixels)), max(1, len(icons.pixels) // 100))
        features = torch.cat([self._features(self._draw(icons, chunk)) for chunk in chunks])
        self._centre = features.mean(0)
        self._gallery = F.normalize(features - self._centre, dim=1)

    def _draw(self, icons: Icons, rows: NDArray[np.int64]) -> Tensor:
        return compose(icons.pixels[rows], plain(len(rows)), self._side, self._side)

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Tensor:
        sized = F.interpolate(pictures, (self._side, self._side), mode="bilinear", antialias=True)
        mean: Tensor = self._encoder(pixel_values=sized).last_hidden_state.mean(1)
        return mean

    def nearest(self, pictures: Tensor) -> NDArray[np.int64]:
        """The concept of the icon with the closest features, for each picture in -1…1."""
        features = F.normalize(self._features(pictures) - self._centre, dim=1)
        found: NDArray[np.int64] = self._concepts[(features @ self._gallery.T).argmax(1)]
        return found


def squares(image: Image.Image) -> Iterator[Image.Image]:
    """The two square pictures that an image of another shape may stand for: squashed, cut out."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    yield image.resize((side, side), Image.Resampling.BICUBIC)
    if image.width != image.height:
        yield image.crop((left, top, left + side, top + side))


def measure_retrieval(
    bench: Bench, made: Sequence[Image.Image], gallery: Gallery, space: EncoderSpace
) -> dict[str, float]:
    """How often a variation is nearest to its own concept among all icons, and how like its input.

    ``made`` has a variation for each of the bench's images, all of one shape.
    """
    readings = [metrics.to_tensor(reading) for reading in zip(*map(squares, made), strict=True)]
    count, concepts = len(made), bench.concepts[: len(made)]

    def top1(nearest: Any) -> float:
        hits = np.stack([nearest(reading) == concepts for reading in readings]).any(0)
        return float(hits.mean())

    return {
        "images": count,
        "pixel_top1": top1(gallery.nearest),
        "encoder_top1": top1(space.nearest),
        "safety_similarity": metrics.SafetyFeatures().similarity(bench.images[:count], made),
    }


def measure_words(bench: Bench, count: int, side: int = 512) -> dict[str, float]:
    """How often a style's word gives that style, beside how often no word does.

    Of held-out concepts drawn in all styles, each input is given the word of another style; the
    output counts for the style of the same concept's icon that it is nearest to in pixels.
    """
    complete = [rows for rows in _styles_of(bench.icons) if len(rows) == len(STYLES)][:count]
    hits = {"with_word": 0, "without": 0}
    for turn, rows in enumerate(complete):
        shown, wanted = STYLES[turn % 3], STYLES[(turn + 1 + turn // 3 % 2) % 3]
        (image,) = draw_icons(bench.icons, [rows[shown]])
        for name, prompt in (("with_word", STYLE_WORDS[wanted][1]), ("without", "")):
            made = bench.vary([image], width=side, height=side, prompt=prompt)
            hits[name] += _nearest_style(bench.icons, rows, made) == wanted
    return {"images": len(complete), **{k: v / len(complete) for k, v in hits.items()}}


def _styles_of(icons: Icons) -> list[dict[str, int]]:
    """For each held-out concept, its icon's number in each style."""
    return [
        {icons.styles[row]: row for row in icons.rows_of(concept)}
        for concept in sorted(icons.held_out)
    ]


def _nearest_style(icons: Icons, rows: dict[str, int], made: list[Image.Image]) -> str:
    choices = metrics.to_tensor(draw_icons(icons, list(rows.values())))
    small, given = (
        F.adaptive_avg_pool2d(pictures, _THUMBNAIL).flatten(1)
        for pictures in (choices, metrics.to_tensor(made))
    )
    return list(rows)[int(torch.cdist(given, small).argmin())]


def measure_changes(strips: dict[str, list[Image.Image]], reference: str) -> dict[str, float]:
    """Mean PSNR in dB of each strip against that of ``reference``: how much an option changes."""
    expected = metrics.to_tensor(strips[reference])
    others = {name: strip for name, strip in strips.items() if name != reference}
    return {
        name: metrics.psnr(expected, metrics.to_tensor(strip)) for name, strip in others.items()
    }


def measure_seeds(strips: Sequence[list[Image.Image]]) -> float:
    """Mean PSNR in dB between the variations of different seeds."""
    tensors = [metrics.to_tensor(strip) for strip in strips]
    return float(np.mean([metrics.psnr(one, two) for one, two in combinations(tensors, 2)]))


def layout_correlation(images: Sequence[Image.Image], made: Sequence[Image.Image]) -> float:
    """Mean Pearson correlation of 8 × 8 colours of each picture with its variation's."""
    pairs = []
    for image, other in zip(images, made, strict=True):
        coarse = [
            np.asarray(each.convert("RGB").resize((_LAYOUT, _LAYOUT), Image.Resampling.BOX), float)
            for each in (image, other)
        ]
        pairs.append(np.corrcoef(coarse[0].ravel(), coarse[1].ravel())[0, 1])
    return float(np.mean(pairs))


def colour_distance(images: Sequence[Image.Image], made: Sequence[Image.Image]) -> float:
    """How far mean colours of pictures and variations are apart: mean, in grey levels of 255."""
    one, two = (
        np.stack([np.asarray(each.convert("RGB"), float).mean((0, 1)) for each in pictures])
        for pictures in (images, made)
    )
    return float(np.abs(one - two).mean())


def measure_drift(exact: Sequence[Image.Image], variant: Sequence[Image.Image]) -> dict[str, float]:
    """PSNR in dB and SSIM of a variant's pictures against the exact ones of the same seeds."""
    one, two = metrics.to_tensor(exact), metrics.to_tensor(variant)
    return {"psnr": metrics.psnr(one, two), "ssim": metrics.ssim(one, two)}
