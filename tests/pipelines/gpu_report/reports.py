"""Whole reports, made up: every stage has a section of the form that the schema gives it."""

from typing import Any

from gpu_report import schema
from gpu_report.report import VERSION
from gpu_report.stages import NAMES

SIDES = ("512", "1024", "1536")


def sample(form: Any) -> Any:
    """Something of this form: 1.5 for numbers, two entries where names are free."""
    if isinstance(form, schema.Fields):
        return {name: sample(each) for name, each in {**form.always, **form.perhaps}.items()}
    if isinstance(form, schema.Each):
        return {name: sample(form.value) for name in SIDES}
    if isinstance(form, list):
        return [sample(form[0])]
    if isinstance(form, tuple):
        return sample(float if float in form else form[0])
    return {str: "text", int: 3, float: 1.5, bool: True}[form]


def made_up(**more: Any) -> dict[str, Any]:
    """A report of a GPU at full size in which every stage ran to its end."""
    return {
        **sample(schema.Fields(schema.HEAD, {})),
        "version": VERSION,
        "device": "cuda",
        "scale": "full",
        "started": "2030-01-02T03:04:05+00:00",
        "stages_s": {name: 1.0 for name in NAMES},
        "failures": {},
        "environment": {
            "gpu": {"name": "NVIDIA Example"},
            "torch": "9.9.9",
            "cuda": "99.1",
            "triton": "8.8.8",
            "python": "3.12.0",
            "project": "0.1.0",
            "commit": "0123456789abcdef",
        },
        **{name: sample(form) for name, form in schema.SECTIONS.items()},
        **more,
    }
