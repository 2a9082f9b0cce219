"""What is measured, most important first, and how long each should take.

Ties stages to their subject and to what earlier ones found. ``need_s`` are estimates for an H100,
by which the runner decides what still fits; they were not measured.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from gpu_report import correctness, images, served, speeds
from gpu_report.against_diffusers import against_diffusers
from gpu_report.memory_check import planned_and_measured
from gpu_report.profile_step import profile_step
from gpu_report.report import Report
from gpu_report.runner import Section, Stage
from gpu_report.subject import Subject

TESTS_LIMIT_S = 120.0
TESTS_LOG = "gpu-tests.log"

NEEDS_S: Mapping[str, tuple[float, float]] = {
    "gpu_tests": (50, TESTS_LIMIT_S + 20),
    "operators": (20, 60),
    "blocks": (15, 60),
    "image": (30, 90),
    "sides": (40, 90),
    "fp8": (45, 100),
    "diffusers": (50, 120),
    "graphs": (15, 60),
    "step_cache": (15, 45),
    "compile": (50, 150),
    "batch": (30, 70),
    "two_pictures": (20, 45),
    "attention": (15, 60),
    "row_kernels": (15, 60),
    "products": (10, 40),
    "profile": (8, 40),
    "memory": (2, 20),
    "server": (25, 90),
}
"""By name: what a stage should take at full size, and what it may, in seconds."""
NAMES = tuple(NEEDS_S)


def stages_of(subject: Subject, report: Report) -> list[Stage]:
    """All of them, in their order, filling sections of ``report``."""
    image, save = partial(_found, report, "image"), report.save
    runs = {
        "gpu_tests": lambda section: correctness.gpu_tests(
            subject.scale, section, TESTS_LIMIT_S, report.path.with_name(TESTS_LOG)
        ),
        "operators": lambda section: correctness.operators(subject, section),
        "blocks": lambda section: correctness.blocks(subject, section),
        "image": lambda section: images.main_image(subject, section, save),
        "sides": lambda section: images.other_sides(subject, section, save),
        "fp8": lambda section: images.in_fp8(subject, section, save, _exact(report)),
        "diffusers": lambda section: against_diffusers(subject, section, save),
        "graphs": lambda section: images.with_graphs(subject, section),
        "step_cache": lambda section: images.with_step_cache(subject, section),
        "compile": lambda section: images.compiled_blocks(subject, section),
        "batch": lambda section: images.several_images(subject, section, image()),
        "two_pictures": lambda section: images.two_pictures(subject, section, image()),
        "attention": lambda section: speeds.attentions(subject, section, save),
        "row_kernels": lambda section: speeds.row_kernels(subject, section),
        "products": lambda section: speeds.products(subject, section),
        "profile": lambda section: profile_step(subject, section),
        "memory": lambda section: planned_and_measured(subject, section, _with_peaks(report)),
        "server": lambda section: served.ten_requests(subject, section, image()),
    }
    is_full = subject.scale.name == "full"
    return [
        Stage(name, runs[name], need_s=need_s if is_full else 0.0, limit_s=limit_s)
        for name, (need_s, limit_s) in NEEDS_S.items()
    ]


def _exact(report: Report) -> dict[str, Section]:
    """Images in the model's own dtype by their side."""
    main, others = _found(report, "image"), _found(report, "sides").get("sides", {})
    return {**others, str(main["side"]): main} if "median_s" in main else dict(others)


def _with_peaks(report: Report) -> dict[str, Section]:
    """Every image with the bytes of its peak, by a label."""
    found: dict[str, Any] = {f"{side}, exact": each for side, each in _exact(report).items()}
    for side, each in _found(report, "fp8").get("sides", {}).items():
        found[f"{side}, fp8"] = each
    for name in ("batch", "two_pictures"):
        found[name] = _found(report, name)
    return {label: each for label, each in found.items() if each.get("peak_bytes")}


def _found(report: Report, name: str) -> Section:
    """A section if there is one, without making it."""
    found: Section = report.content.get(name, {})
    return found
