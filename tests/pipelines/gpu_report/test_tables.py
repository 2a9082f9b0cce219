"""GPU figures in README and docs are what the committed report says, or say that there is none."""

import json

import pytest
from gpu_report import tables
from gpu_report.paths import ROOT
from gpu_report.stages import NAMES
from gpu_report.table import table

from pipelines.gpu_report.reports import made_up
from training.documents import has_place


@pytest.mark.parametrize(("document", "name"), tables.PLACES)
def test_documents_hold_what_the_command_writes(document, name):
    assert has_place(ROOT / document, name)
    report = tables.read(tables.REPORT)
    assert report is None or tables.refusal(report) is None
    text = (ROOT / document).read_text()
    written = tables.PLACES[document, name](report)
    assert f"<!-- figures: {name} -->\n{written}<!-- /figures -->" in text


@pytest.mark.parametrize("make", tables.PLACES.values())
def test_without_a_report_every_cell_says_so(make):
    lines = make(None).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[4:]]
    assert rows
    assert {cell for row in rows for cell in row[1:]} <= {tables.NOT_MEASURED, tables.NEVER}
    assert all(tables.NOT_MEASURED in row for row in rows)


@pytest.mark.parametrize("make", tables.PLACES.values())
def test_figures_come_from_the_report_with_what_they_were_measured_on(make):
    text = make(made_up())
    assert text.startswith("NVIDIA Example, torch 9.9.9, CUDA 99.1")
    assert "commit 0123456789ab; 2030-01-02" in text
    assert tables.NOT_MEASURED not in text


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_that_failed_or_was_not_run_gives_no_figure(name):
    for report in (
        made_up(failures={name: "ValueError"}),
        made_up(**{name: {"not_run": "needs CUDA"}}),
    ):
        assert tables.cell(report, name, lambda _: "a figure") == tables.NOT_MEASURED
    assert tables.cell(made_up(), name, lambda _: "a figure") == "a figure"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"device": "cpu"}, "it is of cpu in full size"),
        ({"scale": "small"}, "it is of cuda in small size"),
        ({"image": {}}, "it is not as it should be: image: lacks dtype"),
    ],
)
def test_figures_are_not_taken_from_a_report_of_something_else(
    change, text, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "gpu-report.json"
    path.write_text(json.dumps(made_up(**change)))
    monkeypatch.setattr(tables, "REPORT", path)
    monkeypatch.setattr(tables, "place_figures", lambda *_: pytest.fail("nothing is written"))
    assert tables.main([]) == 1
    assert text in capsys.readouterr().err


def test_the_command_writes_every_place(tmp_path, monkeypatch):
    path = tmp_path / "gpu-report.json"
    path.write_text(json.dumps(made_up()))
    monkeypatch.setattr(tables, "REPORT", path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    for document, name in tables.PLACES:
        page = tmp_path / document
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"before\n<!-- figures: {name} -->\nold\n<!-- /figures -->\nafter\n")
    assert tables.main([]) == 0
    for document, _ in tables.PLACES:
        text = (tmp_path / document).read_text()
        assert "NVIDIA Example" in text
        assert "\nold\n" not in text
        assert text.startswith("before\n")
        assert text.endswith("after\n")


def test_the_table_that_ends_a_run_has_a_line_for_every_stage_and_failure():
    text = table(made_up(failures={"image": "Traceback\nValueError: wrong"}))
    assert all(f"\n{name}: " in f"\n{text}" for name in NAMES)
    assert text.endswith("FAILED image: ValueError: wrong")
    empty = {**{name: {} for name in NAMES}, "failures": {}}
    assert table(empty) == ""
    assert "incomplete" in table(made_up(image={"dtype": "bfloat16"}))
