"""What tiers and fp8 cost is measured against the exact picture, and lands in the document."""

import json
import re

import pytest

from fp8_products import needs_fp8
from redux_pipelines.loading.load import load_pipeline
from training import approximations
from training.approximations import TABLES, Cost
from training.documents import has_place, place_figures

DOCUMENT = approximations.DOCUMENT.read_text()
REPORT = approximations.ROOT / "docs/benchmarks/approximations-mini.json"


@pytest.fixture(scope="module")
def exact():
    return load_pipeline(model="mini", device="cpu", dtype="float32")


def test_a_tier_is_compared_with_the_exact_picture(exact):
    costs = dict(approximations.measure_tiers(exact, {512: 2}, 10))
    assert list(costs) == ["balanced, 512²", "fast, 512²"]
    balanced, fast = costs.values()
    assert 90 > balanced.psnr > fast.psnr > 20
    assert all(
        cost.psnr >= cost.least_psnr and cost.ssim >= cost.least_ssim for cost in (balanced, fast)
    )
    assert 0 < balanced.reused <= fast.reused < 10
    assert balanced.icons == 2


@needs_fp8
def test_layers_that_are_kept_leave_fp8_and_come_nearer_to_exact():
    costs = dict(approximations.measure_fp8(2, 1))
    shares = {label: cost.share for label, cost in costs.items()}
    assert shares["all"] == shares["all, the model in bfloat16 (as on a GPU)"] == 1
    assert shares["none, the model in bfloat16"] == 0
    kinds = [1 - shares[f"all but `{kind}`"] for kind in approximations.KINDS]
    both = 1 - shares["all but `mlp_out` and `linear2`"]
    assert both == pytest.approx(kinds[1] + kinds[2])
    assert all(0 < share < 1 for share in kinds)
    assert 0 < shares["all but the first and the last block"] < 1
    assert costs["all but `mlp_out` and `linear2`"].psnr > costs["all"].psnr
    assert all(20 < cost.psnr < 90 for cost in costs.values())


def test_icons_are_different_ones_of_the_sheet():
    icons = approximations.icons_for(16)
    assert len({icon.tobytes() for icon in icons}) == 16
    assert {icon.size for icon in icons} == {(128, 128)}


def test_figures_replace_what_is_between_their_marks_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    marked = "<!-- figures: {0} -->\nold\n<!-- /figures -->\n"
    page.write_text("a\n" + marked.format("one") + "b\n" + marked.format("two"))
    place_figures(page, "one", "new \\1\n")
    expected = "a\n<!-- figures: one -->\nnew \\1\n<!-- /figures -->\nb\n" + marked.format("two")
    assert page.read_text() == expected
    for text in ("no marks\n", "<!-- figures: one -->\nno end\n", 2 * marked.format("one")):
        page.write_text(text)
        assert not has_place(page, "one")
        with pytest.raises(ValueError, match="no place for figures: one"):
            place_figures(page, "one", "new\n")
        assert page.read_text() == text


@pytest.mark.parametrize(("name", "table"), TABLES.items(), ids=TABLES)
def test_the_document_shows_what_the_report_says(name, table):
    costs = {label: Cost(**cost) for label, cost in json.loads(REPORT.read_text())[name].items()}
    (shown,) = re.findall(rf"<!-- figures: {name} -->\n(.*?)<!-- /figures -->", DOCUMENT, re.DOTALL)
    cells = [re.findall(r"[-\d.]+", line) for line in shown.splitlines()]
    expected = [re.findall(r"[-\d.]+", line) for line in table(costs).splitlines()]
    assert [len(line) for line in cells] == [len(line) for line in expected]
    for line, other in zip(cells[2:], expected[2:], strict=True):
        # the report has four digits, of which the table rounds some away once more
        assert [float(cell) for cell in line if cell != "-"] == pytest.approx(
            [float(cell) for cell in other if cell != "-"], abs=0.1001
        )
