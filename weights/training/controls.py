"""Measures what the controls of a request do to variations of photographs, by the embedded model.

    make eval-controls

Writes ``report.json``, a contact sheet per control and the tables of docs/guide/controls.md. Knows
the order of measurements and where files lie.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from PIL import Image, ImageOps

from redux_pipelines.contract.types import Fit, GenerationRequest, Pipeline, Result
from redux_pipelines.loading.load import load_pipeline
from training import metrics
from training.documents import has_place, markdown_table, place_figures
from training.reports import environment, rounded, write_json
from training.sheets import Row, save_contact_sheet
from training.yardsticks import colour_distance, layout_correlation

SIDE, WIDE = 512, 2.0
PHOTOGRAPHS = {
    "coffee": "server/redux_server/static/sample.jpg",
    "chelsea": "docs/guide/controls/chelsea.jpg",
    "hopper": "matplotlib's sample_data/grace_hopper.jpg",
}
"""Where they come from: docs/internals/sample-pictures.md. No model of ours was trained on them."""

STRENGTHS = (1, 0.5, 0.25, 0.1, 0.05, 0.02, 0)
POOLINGS = (8, 6, 4, 2, 1)
SHARES = (1, 0.75, 0.5, 0.25, 0)
FITS: tuple[Fit, ...] = ("squash", "letterbox", "center")

ROOT = Path(__file__).parents[2]
_TILE, _SHOWN = (128, 128), 2
FIGURES = "written by make eval-controls"
"""The mark of their place in the document."""

Strip = Sequence[Image.Image]
Figures = dict[str, float]


@dataclass(frozen=True)
class Study:
    """What a control did: figures and pictures, a row for each value of it.

    Of the pictures there are two seeds per photograph.
    """

    name: str
    figures: dict[str, Figures] = field(default_factory=dict)
    sheet: list[Row] = field(default_factory=list)

    def table(self) -> str:
        """Markdown."""
        names = list(next(iter(self.figures.values())))
        rows = [
            [label, *(_shown(each) for each in rounded(row).values())]
            for label, row in self.figures.items()
        ]
        return markdown_table([self.name, *names], rows)


def _shown(value: float) -> str:
    return f"{value:.2f}" if abs(value) <= 1 else f"{value:.1f}"


@dataclass(frozen=True)
class Studio:
    """What is measured with: ``seeds`` variations of each photograph, in ``steps`` steps each."""

    pipeline: Pipeline
    photographs: dict[str, Image.Image]
    seeds: int
    steps: int
    features: metrics.SafetyFeatures = field(default_factory=metrics.SafetyFeatures)

    def vary(self, image: Image.Image, **options: Any) -> list[Image.Image]:
        """Variations of seeds 0, 1, ...; ``options`` are a request's."""
        settings = {"width": SIDE, "height": SIDE, "num_inference_steps": self.steps, **options}
        made: list[Image.Image] = []
        for seed in range(self.seeds):
            *_, last = self.pipeline.generate(GenerationRequest(image, seed=seed, **settings))
            if not isinstance(last, Result):
                raise RuntimeError("the pipeline ended without a result")
            made += last.images
        return made

    def inputs(self, label: str, images: Strip) -> Row:
        """Each picture above each of its variations."""
        return Row(label, _shown_of([[image] * self.seeds for image in images]))

    def compare(self, images: Strip, made: Sequence[Strip]) -> Figures:
        """All that is said of variations ``made[i]`` of ``images[i]``."""
        pairs = paired(images, made)
        return {
            "likeness": self.features.similarity(*pairs),
            "layout": layout_correlation(*pairs),
            "colour, grey levels": colour_distance(*pairs),
        }


def paired(images: Strip, made: Sequence[Strip]) -> tuple[list[Image.Image], list[Image.Image]]:
    """Each picture as often as it has variations, and all of these."""
    pairs = [(image, each) for image, strip in zip(images, made, strict=True) for each in strip]
    return [image for image, _ in pairs], [each for _, each in pairs]


def _shown_of(made: Sequence[Strip]) -> list[Image.Image]:
    """Of each photograph's variations those for the sheet."""
    return [each for strip in made for each in strip[:_SHOWN]]


def study_values(studio: Studio, name: str, values: dict[str, dict[str, Any]]) -> Study:
    """Options of ``values``, by what they are called, on each photograph."""
    photographs = list(studio.photographs.values())
    study = Study(name, sheet=[studio.inputs("photograph", photographs)])
    for label, options in values.items():
        made = [studio.vary(photograph, **options) for photograph in photographs]
        study.figures[label] = studio.compare(photographs, made)
        study.sheet.append(Row(f"{name}\n{label}".replace(" ", "\n"), _shown_of(made)))
    return study


def study_weights(studio: Studio) -> Study:
    """Each photograph together with the next, from all of the one to all of the other."""
    first = list(studio.photographs.values())
    second = [*first[1:], first[0]]
    study = Study("weights", sheet=[studio.inputs("first", first), studio.inputs("second", second)])
    for share in SHARES:
        weights = (share, 1 - share)
        made = [
            studio.vary(one, images=(two,), image_weights=weights)
            for one, two in zip(first, second, strict=True)
        ]
        label = "{:g}, {:g}".format(*weights)
        figures = [studio.compare(pictures, made) for pictures in (first, second)]
        study.figures[label] = {
            f"{what} to the {which}": each[what]
            for what in ("likeness", "layout")
            for which, each in zip(("first", "second"), figures, strict=True)
        }
        study.sheet.append(Row(label, _shown_of(made)))
    return study


def middle(image: Image.Image, ratio: float) -> Image.Image:
    """The largest middle part that is ``ratio`` times as wide as high."""
    size = min(image.width, image.height * ratio), min(image.height, image.width / ratio)
    return ImageOps.fit(image, (round(size[0]), round(size[1])))


def study_fits(studio: Studio) -> Study:
    """Each fit of a wide picture: whether all of the variation shows all of it, and what else.

    What a letterbox should show in the middle of its square is all of it, too; what is in the
    middle of a picture should fill the variation by ``center``.
    """
    wide = [middle(photograph, WIDE) for photograph in studio.photographs.values()]
    squares = [middle(photograph, 1) for photograph in wide]
    study = Study("fit", sheet=[studio.inputs("photograph", wide)])
    for fit in FITS:
        made = [studio.vary(each, fit=fit) for each in wide]
        bands = [[middle(each, WIDE) for each in strip] for strip in made]
        study.figures[fit] = {
            "all in all": layout_correlation(*paired(wide, made)),
            "all in the middle": layout_correlation(*paired(wide, bands)),
            "the middle in all": layout_correlation(*paired(squares, made)),
        }
        study.sheet.append(Row(fit, _shown_of(made)))
    return study


def half(image: Image.Image, side: str) -> Image.Image:
    """The ``left`` or the ``right`` one."""
    edge = image.width // 2
    box = (0, 0, edge, image.height) if side == "left" else (edge, 0, *image.size)
    return image.crop(box)


def left_mask() -> Image.Image:
    """White on the left."""
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return mask


def turned(image: Image.Image) -> Image.Image:
    """With its right half upside down: other pixels of the same colours."""
    changed = image.copy()
    changed.paste(ImageOps.flip(half(image, "right")), (image.width // 2, 0))
    return changed


def study_masks(studio: Studio) -> Study:
    """Without and with a mask of the left half: what is kept, and what a changed right half does.

    The change is the PSNR in dB between variations of the photograph and of the one ``turned``.
    """
    photographs = list(studio.photographs.values())
    study = Study("mask", sheet=[studio.inputs("photograph", photographs)])
    for label, mask in (("none", None), ("left half", left_mask())):
        made = [studio.vary(each, mask=mask) for each in photographs]
        other = [studio.vary(turned(each), mask=mask) for each in photographs]
        pairs = paired(photographs, made)
        study.figures[label] = {
            f"layout, {side}": layout_correlation(
                *([half(each, side) for each in pictures] for pictures in pairs)
            )
            for side in ("left", "right")
        } | {"right half turned, dB": drift(made, other)}
        study.sheet.append(Row(f"mask\n{label}", _shown_of(made)))
        study.sheet.append(Row("right half\nturned", _shown_of(other)))
    return study


def drift(made: Sequence[Strip], other: Sequence[Strip]) -> float:
    """Mean PSNR in dB between pictures at the same places."""
    one, two = (metrics.to_tensor([e for strip in each for e in strip]) for each in (made, other))
    return metrics.psnr(one, two)


def studies(studio: Studio) -> Iterator[Study]:
    """All of them, one after the other."""
    yield study_values(
        studio, "strength", {f"{each:g}": {"redux_strength": each} for each in STRENGTHS}
    )
    yield study_values(studio, "pooling", {f"{each}": {"redux_pooling": each} for each in POOLINGS})
    yield study_weights(studio)
    yield study_fits(studio)
    yield study_masks(studio)
    yield study_values(
        studio, "empty prompt", {each: {"empty_prompt": each} for each in ("zeros", "encode")}
    )


def load_photographs() -> dict[str, Image.Image]:
    """Those of ``PHOTOGRAPHS``, RGB."""
    samples = Path(mpl.get_data_path())
    found = {}
    for name, place in PHOTOGRAPHS.items():
        own = place.removeprefix("matplotlib's ")
        with Image.open(ROOT / own if own == place else samples / own) as opened:
            found[name] = opened.convert("RGB")
    return found


def measure(studio: Studio, out: Path) -> str:
    """Write report and contact sheets to the folder ``out``; the tables come back as Markdown."""
    report: dict[str, Any] = {
        "environment": environment(),
        "photographs": PHOTOGRAPHS,
        "size": f"{SIDE}x{SIDE}",
        "seeds": studio.seeds,
        "steps": studio.steps,
    }
    text = (
        f"\nPhotographs: {len(studio.photographs)}; seeds of each: {studio.seeds}; "
        f"{SIDE} × {SIDE} pixels, {studio.steps} steps, float32, engine.\n"
    )
    columns = len(studio.photographs) * min(_SHOWN, studio.seeds)
    for study in studies(studio):
        name = study.name.replace(" ", "-")
        save_contact_sheet(study.sheet, out / f"{name}.jpg", columns=columns, tile=_TILE)
        report[name] = study.figures
        text += f"\n{study.table()}\n[Sheet]({out.name}/{name}.jpg)\n"
        print(f"\n{study.table()}", end="", flush=True)
    write_json(report, out / "report.json")
    return f"{text}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/guide/controls", help="a folder")
    parser.add_argument("--document", type=Path, help="a Markdown file whose tables to replace")
    parser.add_argument("--seeds", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=28, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    options = parser.parse_args()
    if options.document and not has_place(options.document, FIGURES):
        parser.error(f"{options.document} has no place for figures")  # before all is measured
    torch.set_num_threads(options.threads)
    pipeline = load_pipeline(model="mini", device="cpu", dtype="float32", backend="engine")
    studio = Studio(pipeline, load_photographs(), options.seeds, options.steps)
    text = measure(studio, options.out)
    if options.document:
        place_figures(options.document, FIGURES, text)


if __name__ == "__main__":
    main()
