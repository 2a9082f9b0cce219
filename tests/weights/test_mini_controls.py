"""What the controls of a request do to photographs: in few steps, with the embedded model."""

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from redux_pipelines.contract.types import EMPTY_PROMPTS, FITS
from redux_pipelines.fake import FakePipeline
from training import controls
from training.controls import (
    Studio,
    drift,
    half,
    left_mask,
    load_photographs,
    middle,
    paired,
    turned,
)
from training.documents import has_place
from training.yardsticks import layout_correlation

STEPS, SEEDS = 6, 1
FOLDER = controls.ROOT / "docs/guide/controls"


@pytest.fixture(scope="module")
def studio(pipeline):
    """With two of the photographs, for time."""
    photographs = {name: each for name, each in load_photographs().items() if name != "chelsea"}
    return Studio(pipeline, photographs, SEEDS, STEPS)


@pytest.fixture(scope="module")
def photographs(studio):
    return list(studio.photographs.values())


@pytest.fixture(scope="module")
def plain(studio, photographs):
    """Variations of each photograph, without any control."""
    return [studio.vary(each) for each in photographs]


@pytest.fixture(scope="module")
def without(studio, photographs):
    return [studio.vary(each, redux_strength=0) for each in photographs]


@pytest.fixture(scope="module")
def masked(studio, photographs):
    """Variations of the left half of each."""
    return [studio.vary(each, mask=left_mask()) for each in photographs]


def layout(images, made):
    """Mean correlation of 8 × 8 colours of each picture with its variations."""
    return layout_correlation(*paired(images, made))


def placement(images, made):
    """The same, of what is left when the mean colour of each picture is taken away."""

    def deviations(image):
        small = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), float)
        return (small - small.mean((0, 1))).ravel()

    pairs = zip(*paired(images, made), strict=True)
    return np.mean([np.corrcoef(deviations(one), deviations(two))[0, 1] for one, two in pairs])


# --- strength, pooling, weights -------------------------------------------------------------------


def test_likeness_falls_with_strength(studio, photographs, plain, without):
    """To a twentieth first: a tenth still keeps most of the layout."""
    weak = [studio.vary(each, redux_strength=0.05) for each in photographs]
    figures = [studio.compare(photographs, made) for made in (plain, weak, without)]
    likeness, kept, colour = zip(*(each.values() for each in figures), strict=True)
    assert all(stronger > weaker + 0.05 for stronger, weaker in pairwise(kept)), figures
    assert all(stronger > weaker - 0.02 for stronger, weaker in pairwise(likeness)), figures
    assert likeness[0] > likeness[2] + 0.1, figures
    assert max(colour[:2]) < colour[2] - 10, figures


def test_strength_0_makes_one_picture_of_all_photographs(without):
    assert len({strip[0].tobytes() for strip in without}) == 1


def test_pooling_loses_the_layout_before_the_mean_colour(studio, photographs, plain):
    coarse, single = (
        [studio.vary(each, redux_pooling=side) for each in photographs] for side in (2, 1)
    )
    others = photographs[1:] + photographs[:1]
    own, foreign = (
        studio.compare(images, coarse)["colour, grey levels"] for images in (photographs, others)
    )
    assert own < 0.6 * foreign
    assert placement(photographs, coarse) < placement(photographs, plain) - 0.25
    assert placement(photographs, single) < 0.3


def test_weights_lead_from_one_photograph_to_the_other(studio, photographs):
    first, second = photographs
    made = [
        studio.vary(first, images=(second,), image_weights=weights)
        for weights in ((1, 0), (0.5, 0.5), (0, 1))
    ]
    to_first, to_second = ([layout([each], [one]) for one in made] for each in (first, second))
    assert all(one > other + 0.07 for one, other in pairwise(to_first)), to_first
    assert all(one > other + 0.07 for one, other in pairwise(to_second[::-1])), to_second


# --- fit and mask ---------------------------------------------------------------------------------


def test_letterbox_keeps_the_proportions_that_squash_loses(studio, photographs):
    """In the middle half of its square; what it paints above and below is its own affair."""
    wide = [middle(each, 2) for each in photographs]
    squashed, boxed = (
        [studio.vary(each, fit=fit) for each in wide] for fit in ("squash", "letterbox")
    )
    bands = [[[middle(e, 2) for e in strip] for strip in made] for made in (squashed, boxed)]
    assert placement(wide, bands[1]) > placement(wide, bands[0]) + 0.08
    assert placement(wide, squashed) > placement(wide, boxed) + 0.08


def test_mask_keeps_its_half_and_loses_the_other(photographs, plain, masked):
    def kept(made, side):
        return layout(
            [half(each, side) for each in photographs],
            [[half(each, side) for each in strip] for strip in made],
        )

    assert kept(masked, "left") > kept(plain, "left") - 0.1
    assert kept(masked, "right") < kept(plain, "right") - 0.2


def test_what_is_masked_hardly_changes_the_picture(studio, photographs, plain, masked):
    """It does a little: the image encoder sees it, and tokens know of their neighbours."""
    others = [turned(each) for each in photographs]
    change = drift(plain, [studio.vary(each) for each in others])
    hidden = drift(masked, [studio.vary(each, mask=left_mask()) for each in others])
    assert change + 8 < hidden < 60, (change, hidden)


# --- what is written of it ------------------------------------------------------------------------


class Recorder(FakePipeline):
    """Remembers what it was asked for."""

    def __init__(self):
        super().__init__()
        self.requests = []

    def generate(self, request):
        self.requests.append(request)
        return super().generate(request)


class NoFeatures:
    def similarity(self, images, others):
        return 1.0


def test_every_value_of_every_control_is_asked_for_and_reported(tmp_path):
    pipeline = Recorder()
    photographs = {name: each.resize((48, 32)) for name, each in load_photographs().items()}
    text = controls.measure(Studio(pipeline, photographs, 1, 1, NoFeatures()), tmp_path)
    asked, count = pipeline.requests, len(photographs)
    assert {each.redux_strength for each in asked} == set(controls.STRENGTHS)
    assert {each.redux_pooling for each in asked} >= set(controls.POOLINGS)
    weights = [each.image_weights for each in asked if each.images]
    assert weights == [(share, 1 - share) for share in controls.SHARES for _ in range(count)]
    assert {each.fit for each in asked} == set(FITS)
    assert {each.empty_prompt for each in asked} == set(EMPTY_PROMPTS)
    assert sum(each.mask is not None for each in asked) == 2 * count
    report = json.loads((tmp_path / "report.json").read_text())
    for name, values in (("strength", controls.STRENGTHS), ("pooling", controls.POOLINGS)):
        assert list(report[name]) == [f"{value:g}" for value in values]
        assert (tmp_path / f"{name}.jpg").is_file()
        assert f"]({tmp_path.name}/{name}.jpg)" in text
    assert text.count("| likeness | layout |") == 3


def test_tables_of_the_document_hold_the_figures_of_the_report():
    report = json.loads((FOLDER / "report.json").read_text())
    text = (FOLDER.parent / "controls.md").read_text()
    studies = {name: rows for name, rows in report.items() if (FOLDER / f"{name}.jpg").is_file()}
    assert len(studies) == 6
    for name, rows in studies.items():
        assert controls.Study(name.replace("-", " "), rows).table() in text, name
        assert f"](controls/{name}.jpg)" in text
        assert (FOLDER / f"{name}.jpg").stat().st_size < 300_000
    assert f"seeds of each: {report['seeds']}; " in text
    assert f"{report['steps']} steps" in text


def test_the_document_has_a_place_for_the_tables():
    assert has_place(FOLDER.parent / "controls.md", controls.FIGURES)
