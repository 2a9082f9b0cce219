"""Which device kernels a step spends its time in, by torch's profiler. Times nothing by itself."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_report.clock import synchronize
from gpu_report.runner import Section
from gpu_report.subject import STEP, Subject

NAMED_AT_MOST = 30
NAME_LENGTH = 120


@torch.inference_mode()
def profile_step(subject: Subject, section: Section) -> None:
    """The kernels (on a CPU the operators) of one step at the main side, the longest first.

    A profiled step takes longer than one that is not: shares count, not sums.
    """
    loaded, side = subject.load(), subject.scale.side
    given = subject.conditioning(loaded.components)
    prepared, img = subject.step_of(loaded.engine, given, side)
    prepared.predict(img, STEP)  # what is made at the first call is not of interest
    synchronize(subject.device)
    activities = [ProfilerActivity.CPU]
    if subject.device.type == "cuda":
        activities = [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiled:
        prepared.predict(img, STEP)
        synchronize(subject.device)
    events = sorted(profiled.key_averages(), key=lambda each: -_own_us(subject, each))
    whole_us = sum(_own_us(subject, each) for each in events)
    section.update(side=side, whole_ms=round(whole_us / 1000, 3), longest=[])
    for event in events[:NAMED_AT_MOST]:
        section["longest"].append(
            {
                "name": str(event.key)[:NAME_LENGTH],
                "calls": int(event.count),
                "ms": round(_own_us(subject, event) / 1000, 4),
                "share": round(_own_us(subject, event) / whole_us, 4) if whole_us else 0.0,
            }
        )


def _own_us(subject: Subject, event: Any) -> float:
    """Microseconds in the kernel or operator itself."""
    on_gpu = subject.device.type == "cuda"
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
