"""The form of a report: what is missing, unknown or of another type is named."""

import copy

import pytest
from gpu_report import schema
from gpu_report.stages import NAMES

from pipelines.gpu_report.reports import made_up


def without(report, name, *keys):
    report = copy.deepcopy(report)
    section = report[name]
    for key in keys[:-1]:
        section = section[key]
    del section[keys[-1]]
    return report


def test_every_stage_has_a_form():
    assert tuple(schema.SECTIONS) == NAMES


def test_a_whole_report_is_as_it_should_be():
    assert schema.problems(made_up()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_section_lacks_nothing(name):
    for key in schema.SECTIONS[name].always:
        (problem,) = schema.problems(without(made_up(), name, key))
        assert problem == f"{name}: lacks {key}"


@pytest.mark.parametrize("name", NAMES)
def test_a_section_of_a_stage_that_failed_or_was_not_run_may_lack_anything(name):
    failed = made_up(failures={name: "ValueError"}, **{name: {}})
    not_run = made_up(**{name: {"not_run": "needs CUDA"}})
    assert schema.problems(failed) == schema.problems(not_run) == []


def test_a_section_that_was_cut_off_is_no_problem():
    report = made_up(image={"dtype": "bfloat16"})
    del report["stages_s"]["image"]
    assert schema.problems(report) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 2}, "version is 2, and this reads 1"),
        ({"stages_s": {"image": "1"}}, "report.stages_s.image: is '1', not"),
        ({"environment": None}, "environment: is no object"),
        ({"speed": {}}, "speed: no stage has this name"),
        ({"blocks": {**made_up()["blocks"], "more": 1}}, "blocks: has unknown more"),
        ({"blocks": {**made_up()["blocks"], "blocks": 5}}, "blocks.blocks: is no list"),
        ({"blocks": {**made_up()["blocks"], "side": 1.5}}, "blocks.side: is 1.5, not int"),
        ({"blocks": {**made_up()["blocks"], "errors": {"a": None}}}, "blocks.errors.a: is None"),
        ({"image": []}, "image: is no object"),
    ],
)
def test_what_is_wrong_is_named(change, text):
    assert schema.problems(made_up(**change))[0].startswith(text)


def test_a_stage_that_ran_has_a_section():
    report = made_up()
    del report["image"]
    assert schema.problems(report) == ["image: ran without a section"]
