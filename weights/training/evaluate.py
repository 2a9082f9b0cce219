"""Measures the mini model through the product's own pipeline and draws contact sheets.

    make eval-mini                                    # the embedded model
    python -m training.evaluate --run --work DIR      # what a training run exported
    ... --variant dtype=bfloat16 --variant steps=14   # drift of variants against float32

Writes ``report.json`` and JPEGs. Knows the order of measurements and where files lie.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from redux_pipelines.contract.types import Pipeline
from redux_pipelines.loading.load import load_pipeline
from redux_pipelines.memory.malloc import keep_freed_memory
from redux_weights.embedded import Checkpoint, find_mini
from training import cli, fetch
from training.dataset import HELD_OUT_PHOTOS, Icons, load_icons
from training.icons import COLUMNS, TILE
from training.probe import Gallery
from training.reports import environment, rounded, write_json
from training.settings import FULL
from training.sheets import Row, save_contact_sheet, save_tiles
from training.workplace import Workplace
from training.yardsticks import (
    Bench,
    EncoderSpace,
    layout_correlation,
    make_bench,
    measure_changes,
    measure_drift,
    measure_retrieval,
    measure_seeds,
    measure_words,
)

VARIANTS = (
    "backend=diffusers",
    "dtype=bfloat16",
    "transformer_dtype=fp8",
    "quality=balanced",
    "quality=fast",
    "steps=14",
    "steps=8",
)
_WORDS = ("", "flat design", "3d render", "cartoon style", "glossy 3d, cat")
_GUIDANCES = (1.0, 3.5, 8.0, 20.0)
_SHAPES = ((768, 1344), (1536, 512))
_PHOTO_SHAPES = ((512, 512), (1024, 1024), (1344, 768))


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured: ``icons`` and ``shown`` held-out ones, ``few`` of them per option."""

    icons: int = 130
    shown: int = 48
    few: int = 12
    words: int = 24
    drifting: int = 16
    steps: int = 28


def measure_squares(
    bench: Bench, gallery: Gallery, space: EncoderSpace, extent: Extent, out: Path
) -> dict[str, Any]:
    """Retrieval and a sheet at 512 × 512 and 1024 × 1024, for all icons."""
    report = {}
    for side in (512, 1024):
        made = bench.vary(bench.images, width=side, height=side)
        report[f"{side}x{side}"] = measure_retrieval(bench, made, gallery, space)
        _sheet(bench, made[: extent.shown], out / f"held-out-{side}x{side}.jpg")
    return report


def measure_shapes(
    bench: Bench, gallery: Gallery, space: EncoderSpace, extent: Extent, out: Path
) -> dict[str, Any]:
    """The same for two shapes that are no squares, for those that are shown."""
    report = {}
    for width, height in _SHAPES:
        name = f"{width}x{height}"
        made = bench.vary(bench.images[: extent.shown], width=width, height=height)
        report[name] = measure_retrieval(bench, made, gallery, space)
        _sheet(bench, made, out / f"held-out-{name}.jpg")
    return report


def _sheet(bench: Bench, made: Sequence[Image.Image], path: Path) -> None:
    rows = [Row("input", bench.images[: len(made)]), Row(path.stem.split("-")[-1], made)]
    save_contact_sheet(rows, path)


def measure_options(bench: Bench, extent: Extent, out: Path) -> dict[str, Any]:
    """What words, guidance and seeds do, each with a sheet."""
    few = bench.images[: extent.few]

    def strip(**options: Any) -> list[Image.Image]:
        return bench.vary(few, width=512, height=512, **options)

    def sheet(name: str, strips: dict[str, list[Image.Image]]) -> None:
        rows = [Row(label.replace(", ", ",\n"), images) for label, images in strips.items()]
        save_contact_sheet([Row("input", few), *rows], out / f"{name}.jpg", columns=len(few))

    words = {word or "(no words)": strip(prompt=word) for word in _WORDS}
    guided = {f"guidance\n{value:g}": strip(guidance_scale=value) for value in _GUIDANCES}
    seeds = {f"seed {seed}": strip(seed=seed) for seed in range(4)}
    for name, strips in (("words", words), ("guidance", guided), ("seeds", seeds)):
        sheet(name, strips)
    return {
        "words": measure_words(bench, extent.words),
        "psnr_to_no_words": measure_changes(words, "(no words)"),
        "psnr_to_guidance_3.5": measure_changes(guided, "guidance\n3.5"),
        "psnr_between_seeds": measure_seeds(list(seeds.values())),
    }


def measure_photos(bench: Bench, folder: Path, out: Path) -> dict[str, float]:
    """Whether colours and layout of photographs are kept, with a sheet."""
    photos = []
    for name in HELD_OUT_PHOTOS:
        with Image.open(folder / name) as opened:
            photos.append(opened.convert("RGB"))
    rows, report = [Row("photograph", photos)], {}
    for width, height in _PHOTO_SHAPES:
        name = f"{width}x{height}"
        made = bench.vary(photos, width=width, height=height)
        rows.append(Row(name, made))
        report[name] = layout_correlation(photos, made)
    save_contact_sheet(rows, out / "photographs.jpg", columns=len(photos), tile=(336, 256))
    return report


def measure_variants(
    bench: Bench, variants: Sequence[str], load: Callable[..., Pipeline], count: int
) -> dict[str, dict[str, float]]:
    """Drift of each variant at 512 × 512.

    A variant is ``steps=N`` or an option of ``load_pipeline``, such as ``dtype=bfloat16`` or
    ``quality=fast``.
    """
    few = bench.images[:count]
    exact = bench.vary(few, width=512, height=512)
    report = {}
    for variant in variants:
        name, value = variant.split("=", 1)
        if name == "steps":
            other = replace(bench, steps=int(value))
        else:
            other = replace(bench, pipeline=load(**{name: value}))
        report[variant] = measure_drift(exact, other.vary(few, width=512, height=512))
    return report


def evaluate(
    checkpoint: Checkpoint,
    icons: Icons,
    photos: Path,
    out: Path,
    *,
    variants: Sequence[str] = VARIANTS,
    extent: Extent = Extent(),
) -> dict[str, Any]:
    """Measure everything; write and return the report."""
    source: dict[str, Any] = {"base": checkpoint.base, "redux": checkpoint.redux}
    if checkpoint == find_mini():
        source = {"model": "mini"}

    def load(**options: str) -> Pipeline:
        settings: dict[str, Any] = {**source, "device": "cpu", "dtype": "float32", **options}
        return load_pipeline(**settings)

    out.mkdir(parents=True, exist_ok=True)
    bench = make_bench(load(), icons, extent.icons, extent.steps)
    save_tiles(bench.images, out / "inputs.webp", columns=COLUMNS, side=TILE)
    gallery, space = Gallery(icons), EncoderSpace(checkpoint.redux, icons)
    report: dict[str, Any] = {
        "environment": environment(),
        "retrieval": {
            **measure_squares(bench, gallery, space, extent, out),
            **measure_shapes(bench, gallery, space, extent, out),
        },
        "options": measure_options(bench, extent, out),
        "photograph_layout_correlation": measure_photos(bench, photos, out),
        "drift": measure_variants(bench, variants, load, extent.drifting),
        "safety": bench.seen.verdict(),
    }
    write_json(report, out / "report.json")
    return report


def main() -> None:
    """Command line."""
    parser: argparse.ArgumentParser = cli.parser(__doc__)
    parser.add_argument(
        "--run", action="store_true", help="what a training run exported, not the embedded model"
    )
    parser.add_argument("--out", type=Path, help="default: the report folder below --work")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--icons", type=int, default=Extent().icons, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    place = Workplace(options.work)
    fetch.fetch(place)
    checkpoint = Checkpoint(place.base, place.redux) if options.run else find_mini()
    report = evaluate(
        checkpoint,
        load_icons(place.data, FULL.held_out),
        place.photos,
        options.out or place.report,
        variants=options.variant or VARIANTS,
        extent=Extent(icons=options.icons),
    )
    print(json.dumps(rounded(report), indent=2))


if __name__ == "__main__":
    main()
