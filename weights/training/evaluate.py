"""Measures an exported model through the product's own pipeline and draws contact sheets.

    python -m training.evaluate --work DIR [--variant dtype=bfloat16 --variant steps=14]

Writes ``report/report.json`` and PNGs. Knows the product's interface and the data; no training.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import SiglipVisionModel

from redux_pipelines.loading import load_pipeline
from redux_pipelines.safety import DEFAULT_THRESHOLD, OpenNsfwChecker
from redux_pipelines.types import GenerationRequest, Pipeline, Result
from training import cli, metrics
from training.augment import compose, plain
from training.dataset import HELD_OUT_PHOTOS, Icons, load_icons
from training.probe import Gallery, save_sheet
from training.settings import FULL, SMOKE
from training.workplace import Workplace

_WORDS = ("", "flat", "3d", "cartoon", "glossy 3d, cat")
_GUIDANCES = (1.0, 3.5, 8.0, 20.0)
_SHAPES = ((512, 512), (1024, 1024), (1536, 1024), (768, 1280))
_THUMBNAIL = 192
_SHEET = 12


@dataclass(frozen=True)
class Bench:
    """What is measured with: a pipeline, the icons and ``images`` of held-out ones on white."""

    pipeline: Pipeline
    icons: Icons
    rows: list[int]
    images: list[Image.Image]
    steps: int


def generate(pipeline: Pipeline, request: GenerationRequest) -> Image.Image:
    """The one picture of a request."""
    for event in pipeline.generate(request):
        if isinstance(event, Result):
            return event.images[0]
    raise RuntimeError("the pipeline ended without a result")


def variations(bench: Bench, images: Sequence[Image.Image], **options: Any) -> list[Image.Image]:
    """One variation of each image; ``options`` are a request's."""
    settings = {"num_inference_steps": bench.steps, **options}
    return [generate(bench.pipeline, GenerationRequest(image, **settings)) for image in images]


def make_bench(pipeline: Pipeline, icons: Icons, count: int, steps: int) -> Bench:
    """``count`` held-out icons, at most one per concept as far as there are enough concepts."""
    order = np.random.default_rng(3).permutation(icons.held_out_rows)
    firsts = {int(icons.concepts[row]): int(row) for row in order[::-1]}
    rows = list(firsts.values())[:count]
    drawn = compose(icons.pixels[rows], plain(len(rows)), 256, 256)
    return Bench(pipeline, icons, rows, metrics.to_images(drawn), steps)


class EncoderSpace:
    """All icons as mean SigLIP features of the exported encoder."""

    def __init__(self, redux: Path, icons: Icons) -> None:
        encoder: Any = SiglipVisionModel.from_pretrained(redux / "image_encoder")
        self._encoder, self._side = encoder, int(encoder.config.image_size)
        self._concepts = icons.concepts
        chunks = np.array_split(np.arange(len(icons.pixels)), max(1, len(icons.pixels) // 100))
        self._gallery = torch.cat(
            [
                self.embed(compose(icons.pixels[c], plain(len(c)), self._side, self._side))
                for c in chunks
            ]
        )

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """Unit vectors ``(B, E)`` of pictures in -1…1 of any size."""
        sized = F.interpolate(pictures, (self._side, self._side), mode="bilinear", antialias=True)
        features = self._encoder(pixel_values=sized.to(self._encoder.dtype)).last_hidden_state
        return F.normalize(features.float().mean(1), dim=1)

    def nearest(self, pictures: Tensor) -> Any:
        """The concept of the icon with the closest features, for each picture."""
        return self._concepts[(self.embed(pictures) @ self._gallery.T).argmax(1)]


def measure_retrieval(bench: Bench, space: EncoderSpace, out: Path) -> dict[str, Any]:
    """How often a variation is nearest to its own concept, and how the safety net sees it."""
    gallery, features, checker = Gallery(bench.icons), metrics.SafetyFeatures(), OpenNsfwChecker()
    concepts = bench.icons.concepts[bench.rows]
    report: dict[str, Any] = {}
    for side in (512, 1024):
        made = variations(bench, bench.images, width=side, height=side)
        pictures, scores = metrics.to_tensor(made), checker.scores(made)
        report[f"{side}"] = {
            "pixel_top1": float((gallery.nearest(pictures) == concepts).mean()),
            "encoder_top1": float((space.nearest(pictures) == concepts).mean()),
            "safety_similarity": features.similarity(bench.images, made),
            "safety_highest": max(scores),
            "safety_flags": sum(score >= DEFAULT_THRESHOLD for score in scores),
        }
        _sheet([bench.images, made], out / f"held-out-{side}.png")
    inputs = metrics.to_tensor(bench.images)
    report["encoder_top1_of_inputs"] = float((space.nearest(inputs) == concepts).mean())
    return report


def draw_sheets(bench: Bench, photos: Path, out: Path) -> None:
    """Contact sheets: words, guidance and seeds on icons; shapes on held-out photographs."""
    few = bench.images[:_SHEET]
    _sheet([few, *(variations(bench, few, width=512, height=512, prompt=w) for w in _WORDS)],
           out / "words.png")  # fmt: skip
    guided = (variations(bench, few, width=512, height=512, guidance_scale=g) for g in _GUIDANCES)
    _sheet([few, *guided], out / "guidance.png")
    seeds = (variations(bench, few, width=512, height=512, seed=seed) for seed in range(4))
    _sheet([few, *seeds], out / "seeds.png")
    for name in HELD_OUT_PHOTOS:
        with Image.open(photos / name) as opened:
            image = opened.convert("RGB")
        made = [variations(bench, [image], width=w, height=h)[0] for w, h in _SHAPES]
        for (width, height), picture in zip(_SHAPES, made, strict=True):
            picture.save(out / f"{Path(name).stem}-{width}x{height}.png")


def _sheet(rows: list[list[Image.Image]], path: Path) -> None:
    strips = []
    for start in range(0, len(rows[0]), _SHEET):
        for row in rows:
            part = [image.resize((_THUMBNAIL, _THUMBNAIL)) for image in row[start : start + _SHEET]]
            part += [Image.new("RGB", (_THUMBNAIL, _THUMBNAIL))] * (_SHEET - len(part))
            strips.append(metrics.to_tensor(part))
    save_sheet(strips, path)


def measure_drift(
    bench: Bench, variants: Sequence[str], load: Callable[..., Pipeline]
) -> dict[str, dict[str, float]]:
    """PSNR and SSIM against the float32 pictures of the same seeds at 512 × 512.

    A variant is ``steps=N`` or an option of ``load_pipeline``, such as ``dtype=bfloat16``.
    """
    few = bench.images[:16]
    exact = metrics.to_tensor(variations(bench, few, width=512, height=512))
    report = {}
    for variant in variants:
        name, value = variant.split("=", 1)
        if name == "steps":
            other = replace(bench, steps=int(value))
        else:
            other = replace(bench, pipeline=load(**{name: value}))
        made = metrics.to_tensor(variations(other, few, width=512, height=512))
        report[variant] = {"psnr": metrics.psnr(exact, made), "ssim": metrics.ssim(exact, made)}
    return report


def evaluate(
    place: Workplace, icons: Icons, variants: Sequence[str], *, count: int = 48, steps: int = 28
) -> dict[str, Any]:
    """Measure ``place.base`` and ``place.redux``; write and return the report."""

    def load(**options: str) -> Pipeline:
        settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", **options}
        return load_pipeline(base=place.base, redux=place.redux, **settings)

    place.report.mkdir(parents=True, exist_ok=True)
    bench = make_bench(load(), icons, count, steps)
    report = measure_retrieval(bench, EncoderSpace(place.redux, icons), place.report)
    report["drift"] = measure_drift(bench, variants, load)
    draw_sheets(bench, place.photos, place.report)
    (place.report / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    """Command line."""
    parser: argparse.ArgumentParser = cli.parser(__doc__)
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--count", type=int, default=48, help="held-out icons, default: 48")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    place, sizes = Workplace(options.work), SMOKE if options.smoke else FULL
    icons = load_icons(place.data, sizes.held_out)
    variants = options.variant or ["dtype=bfloat16", "steps=14", "steps=8"]
    print(json.dumps(evaluate(place, icons, variants, count=options.count), indent=2))


if __name__ == "__main__":
    main()
