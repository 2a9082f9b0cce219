"""The form of a report, version 1, and what in a given one is not of that form.

A form is a type, a tuple of alternatives, a ``Fields`` of named ones, an ``Each`` for all values of
an object, or a list with one for all its items. Imports nothing of the measurements, so that
whoever reads a report can check it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpu_report.report import VERSION

Form = Any


@dataclass(frozen=True)
class Fields:
    """An object with all of ``always``, perhaps some of ``perhaps``, and nothing else."""

    always: Mapping[str, Form]
    perhaps: Mapping[str, Form]


@dataclass(frozen=True)
class Each:
    """An object whose names are free and whose values have one form."""

    value: Form


def fields(**always: Form) -> Fields:
    """An object with exactly these."""
    return Fields(always, {})


NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))
OPTIONAL_TEXT = (str, type(None))
OPTIONAL_BYTES = (int, type(None))
TIMING_FIELDS = {"device_ms": OPTIONAL_NUMBER, "host_ms": NUMBER, "count": int}
TIMING = fields(**TIMING_FIELDS)
SPEED = fields(**TIMING_FIELDS, tflops=NUMBER)
SHARED_SPEED = fields(**TIMING_FIELDS, tflops=NUMBER, share_of_peak=NUMBER)
IMAGE_FIELDS: Mapping[str, Form] = {
    "side": int,
    "steps": int,
    "first_s": NUMBER,
    "median_s": NUMBER,
    "count": int,
    "stages": Each(NUMBER),
    "peak_bytes": OPTIONAL_BYTES,
    "mode": str,
    "is_fp8": bool,
}
MADE_FIELDS: Mapping[str, Form] = {
    "dtype": str,
    "load_s": NUMBER,
    "resident_bytes": OPTIONAL_BYTES,
    "chosen": fields(
        operators=str,
        operators_refused=Each(str),
        attention=str,
        attention_refused=Each(str),
        plan=str,
    ),
}
AGAINST_PLAIN = Each(fields(step=TIMING, plain=TIMING, ratio_to_plain=NUMBER))
SECTIONS: Mapping[str, Fields] = {
    "gpu_tests": fields(
        exit_code=int, log=str, passed=int, skipped=int, failed=[str], failed_count=int
    ),
    "operators": fields(
        kernels=Each(fields(refused=OPTIONAL_TEXT, share_of_tolerance=OPTIONAL_NUMBER)),
        attention=Each(fields(refused=OPTIONAL_TEXT, worst_query_error=OPTIONAL_NUMBER)),
    ),
    "blocks": fields(side=int, dtype=str, blocks=[int], errors=Each(NUMBER)),
    "image": fields(**MADE_FIELDS, **IMAGE_FIELDS, step=TIMING),
    "sides": fields(sides=Each(fields(**IMAGE_FIELDS, step=TIMING))),
    "fp8": fields(
        **MADE_FIELDS,
        sides=Each(fields(**IMAGE_FIELDS, step=TIMING, ratio_to_exact=OPTIONAL_NUMBER)),
    ),
    "diffusers": fields(
        side=int,
        dtype=str,
        relative_difference=NUMBER,
        engine=TIMING,
        eager=TIMING,
        ratio_to_eager=NUMBER,
        compiled=(
            fields(compile_s=NUMBER, step=TIMING, engine=TIMING, ratio_engine_to_compiled=NUMBER),
            fields(not_run=str),
        ),
    ),
    "graphs": fields(problems=[str], sides=AGAINST_PLAIN),
    "step_cache": fields(
        side=int,
        steps=int,
        is_forced=bool,
        exact=fields(denoise_s=NUMBER, count=int, reused_steps=int),
        forced=fields(denoise_s=NUMBER, count=int, reused_steps=int),
        ratio_to_exact=NUMBER,
    ),
    "compile": fields(compile_s=NUMBER, problems=[str], graphs=int, sides=AGAINST_PLAIN),
    "batch": fields(
        **IMAGE_FIELDS,
        images=int,
        step=TIMING,
        per_image_s=NUMBER,
        ratio_to_one_by_one=OPTIONAL_NUMBER,
    ),
    "two_pictures": fields(
        **IMAGE_FIELDS, pictures=int, strength=NUMBER, ratio_to_one_picture=OPTIONAL_NUMBER
    ),
    "attention": fields(heads=int, head_dim=int, refused=Each(str), rows=Each(Each(SPEED))),
    "row_kernels": fields(
        copy_gb_per_s=NUMBER,
        rows=int,
        refused=Each(str),
        kernels=Each(
            fields(
                kernel_ms=NUMBER,
                torch_ms=NUMBER,
                ratio_to_torch=NUMBER,
                gb_per_s=NUMBER,
                share_of_copy=NUMBER,
            )
        ),
    ),
    "products": fields(
        rows=int,
        peak=SPEED,
        fp8_peak=(SPEED, type(None)),
        fp8_refused=OPTIONAL_TEXT,
        products=Each(Fields({"plain": SHARED_SPEED}, {"fp8": SHARED_SPEED})),
    ),
    "profile": fields(
        side=int,
        whole_ms=NUMBER,
        longest=[fields(name=str, calls=int, ms=NUMBER, share=NUMBER)],
    ),
    "memory": fields(
        images=Each(
            fields(
                mode=str,
                planned_bytes=int,
                of_it_caches_bytes=int,
                measured_bytes=int,
                ratio=NUMBER,
            )
        )
    ),
    "server": fields(
        requests=int,
        side=int,
        steps=int,
        submitted_s=NUMBER,
        whole_s=NUMBER,
        per_request_s=NUMBER,
        completed=int,
        ratio_to_pipeline=OPTIONAL_NUMBER,
    ),
}
"""By stage: what its section holds when it ran to its end."""
HEAD: Mapping[str, Form] = {
    "version": int,
    "started": str,
    "device": str,
    "scale": str,
    "budget_s": NUMBER,
    "total_s": NUMBER,
    "stages_s": Each(NUMBER),
    "failures": Each(str),
}


def problems(report: Mapping[str, Any]) -> list[str]:
    """What of ``report`` is not as this version says; empty for a good one.

    A section whose stage failed, or that says why it was not run, may be part of what it would be.
    """
    if report.get("version") != VERSION:
        return [f"version is {report.get('version')!r}, and this reads {VERSION}"]
    head = {name: report.get(name) for name in HEAD}
    found = [*_misfits(head, Fields(HEAD, {}), "report")]
    if not isinstance(report.get("environment"), dict):
        found.append("environment: is no object")
    for name, section in report.items():
        if name in (*HEAD, "environment"):
            continue
        if name not in SECTIONS:
            found.append(f"{name}: no stage has this name")
        elif name not in report["stages_s"]:
            continue  # cut off in the middle of it
        else:
            is_whole = name not in report["failures"] and "not_run" not in section
            found += _misfits(section, _form(name, is_whole), name)
    found += [f"{name}: ran without a section" for name in report["stages_s"] if name not in report]
    return found


def _form(name: str, is_whole: bool) -> Fields:
    if is_whole:
        return SECTIONS[name]
    whole = SECTIONS[name]
    return Fields({}, {**whole.always, **whole.perhaps, "not_run": str})


def _misfits(given: Any, form: Form, place: str) -> Iterator[str]:
    if isinstance(form, Fields):
        yield from _object_misfits(given, form, place)
    elif isinstance(form, Each):
        yield from _each_misfits(given, form, place)
    elif isinstance(form, list):
        items = given if isinstance(given, list) else ()
        if not isinstance(given, list):
            yield f"{place}: is no list"
        for index, item in enumerate(items):
            yield from _misfits(item, form[0], f"{place}[{index}]")
    elif isinstance(form, tuple):
        tried = [list(_misfits(given, each, place)) for each in form]
        if all(tried):
            yield min(tried, key=len)[0]
    elif type(given) is not form:
        yield f"{place}: is {given!r}, not {form.__name__}"


def _object_misfits(given: Any, form: Fields, place: str) -> Iterator[str]:
    if not isinstance(given, dict):
        yield f"{place}: is no object"
        return
    known = {**form.always, **form.perhaps}
    yield from (f"{place}: lacks {name}" for name in form.always if name not in given)
    for name, value in given.items():
        if name in known:
            yield from _misfits(value, known[name], f"{place}.{name}")
        else:
            yield f"{place}: has unknown {name}"


def _each_misfits(given: Any, form: Each, place: str) -> Iterator[str]:
    if not isinstance(given, dict):
        yield f"{place}: is no object"
        return
    for name, value in given.items():
        yield from _misfits(value, form.value, f"{place}.{name}")
