"""The memory plan against what torch's allocator saw at the peak of the images of this run.

Predicted for the same sizes, without text encoders. Makes no image of its own.
"""

from collections.abc import Mapping
from typing import Any

from gpu_report.images import NEEDS_CUDA
from gpu_report.runner import NotRun, Section
from gpu_report.subject import Subject
from redux_pipelines.memory.activations import Demand
from redux_pipelines.memory.cards import Card
from redux_pipelines.memory.plan import CACHE_BYTES, Options, plan

_ANY_CARD = Card("any card", 2**60)  # of one of these modes the peak does not depend on it


def planned_and_measured(
    subject: Subject, section: Section, images: Mapping[str, Mapping[str, Any]]
) -> None:
    """For each of ``images`` (label to section, with ``peak_bytes``) the plan's bytes beside it."""
    if subject.device.type != "cuda":
        raise NotRun(NEEDS_CUDA)
    if not images:
        raise NotRun("no image was measured in this run")
    section["images"] = {}
    for label, image in images.items():
        if image["mode"] == "offload":  # how much streams depends on what was free then
            continue
        planned = planned_bytes(subject, image)
        section["images"][label] = {
            "mode": image["mode"],
            "planned_bytes": planned,
            "of_it_caches_bytes": CACHE_BYTES,
            "measured_bytes": image["peak_bytes"],
            "ratio": round(image["peak_bytes"] / planned, 4),
        }


def planned_bytes(subject: Subject, image: Mapping[str, Any]) -> int:
    """The plan's peak for such an image in its mode, with full caches."""
    sizes, side = subject.sizes, image["side"]
    demand = Demand(
        width=side,
        height=side,
        batch=image.get("images", 1),
        text_rows=1,
        redux_rows=sizes.siglip.tokens * image.get("pictures", 1),
    )
    dtype = str(subject.dtype).removeprefix("torch.")
    options = Options(dtype=dtype, is_fp8=image["is_fp8"], demand=demand)
    return plan(sizes, _ANY_CARD, options, image["mode"]).peak_bytes
