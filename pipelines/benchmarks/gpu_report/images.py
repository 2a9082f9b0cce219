"""Whole images and single steps through the pipeline: the stages whose figures people ask for.

Each function fills the section of one stage. A step is timed on the device and on the host; an
image by the clock, from the request to the picture on the host.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from gpu_report.clock import measure, ratio, synchronize
from gpu_report.runner import NotRun, Section
from gpu_report.subject import STEP, Loaded, Subject, a_picture, even_schedule
from redux_pipelines.contract.types import CompilePlan, GenerationRequest, Result
from redux_pipelines.denoising.denoiser import PreparedDenoiser
from redux_pipelines.denoising.quality import TIERS, CachePolicy, Tier
from redux_pipelines.errors import RequestError
from redux_pipelines.fp8 import self_test as fp8_test
from redux_pipelines.network.flux import FluxParams
from redux_pipelines.pipeline import ReduxPipeline

NEEDS_CUDA = "needs CUDA"
FORCED = CachePolicy(threshold=float("inf"), warm_up=4, max_hits=1)
"""Reuses every other step after the fourth: 12 of 28, as ``balanced`` does on ``mini``."""
SHARED_BATCH = 4
GRAPHS = 4
Save = Callable[[], None]


def main_image(subject: Subject, section: Section, save: Save) -> None:
    """One image of the main side, exact."""
    loaded = subject.load()
    section.update(describe(subject, loaded))
    section.update(measured(subject, subject.scale.side))
    save()
    section["step"] = step(subject, loaded, subject.scale.side)


def other_sides(subject: Subject, section: Section, save: Save) -> None:
    """The same at the other sides."""
    loaded = subject.load()
    sides = section["sides"] = {}
    for side in subject.scale.other_sides:
        sides[str(side)] = {
            **measured(subject, side, repeats=_fewer(subject)),
            "step": step(subject, loaded, side),
        }
        save()


def in_fp8(subject: Subject, section: Section, save: Save, exact: Mapping[str, Any]) -> None:
    """The blocks' layers in fp8; ratios to ``exact``, the sections of the model's own dtype."""
    width = FluxParams.of(subject.scale.transformer).hidden_size
    if (reason := fp8_test.refusal(subject.device, subject.dtype, width)) is not None:
        raise NotRun(reason)
    loaded = subject.load(is_fp8=True)
    section.update(describe(subject, loaded))
    sides = section["sides"] = {}
    for side in subject.scale.sides:
        repeats = subject.scale.repeats if side == subject.scale.side else _fewer(subject)
        found = measured(subject, side, is_fp8=True, repeats=repeats)
        sides[str(side)] = {**found, "step": step(subject, loaded, side)}
        sides[str(side)]["ratio_to_exact"] = _ratio(found, exact.get(str(side)))
        save()


def with_step_cache(subject: Subject, section: Section) -> None:
    """All steps of an image, computed and with every other one reused, whatever that would cost.

    Random weights have no small changes from step to step for a threshold to find, so reuse is
    forced: times only, nothing about pictures.
    """
    loaded, side, steps = subject.load(), subject.scale.side, subject.scale.steps
    given = subject.conditioning(loaded.components)
    prepared, _ = subject.step_of(loaded.engine, given, side, schedule=even_schedule(steps))
    policy = FORCED if steps > FORCED.warm_up else replace(FORCED, warm_up=1, final=0)
    section.update(side=side, steps=steps, is_forced=True)
    for name, tier in (("exact", TIERS["exact"]), ("forced", Tier(policy))):
        runs = [_all_steps(subject, prepared, tier) for _ in range(1 + _fewer(subject))][1:]
        section[name] = {
            "denoise_s": round(statistics.median(seconds for seconds, _ in runs), 4),
            "count": len(runs),
            "reused_steps": runs[-1][1],
        }
    section["ratio_to_exact"] = round(
        section["forced"]["denoise_s"] / section["exact"]["denoise_s"], 4
    )


@torch.inference_mode()
def _all_steps(subject: Subject, prepared: PreparedDenoiser, tier: Tier) -> tuple[float, int]:
    """Seconds of all steps of one image, and how many of them reused a part."""
    steps, img = subject.scale.steps, subject.noise(subject.grid(subject.scale.side))
    run = prepared.start(tier)
    synchronize(subject.device)
    started = time.perf_counter()
    for index in range(steps):
        img = img - run.predict(img, index) / steps
    synchronize(subject.device)
    return time.perf_counter() - started, run.reused


def with_graphs(subject: Subject, section: Section) -> None:
    """A step replayed as a CUDA graph against the same step queued anew."""
    _require_cuda(subject)
    loaded, scale = subject.load(), subject.scale
    sides = (scale.side, scale.other_sides[0])
    plain = {side: step(subject, loaded, side) for side in sides}
    plan = CompilePlan(mode="off", sizes=square(sides), cuda_graphs=GRAPHS)
    try:
        report = subject.pipeline().compile(plan)
        section["problems"] = list(report.failures)
        if loaded.engine.graphed is None:
            raise NotRun("; ".join(report.failures) or "no step was captured")
        section["sides"] = _against_plain(subject, loaded, plain)
    finally:
        if loaded.engine.graphed is not None:
            loaded.engine.graphed.clear()
        loaded.engine.graphed = None


def compiled_blocks(subject: Subject, section: Section) -> None:
    """A step of ``--compile blocks`` against the eager one."""
    _require_cuda(subject)
    loaded, scale = subject.load(), subject.scale
    sides = (scale.side, scale.other_sides[0])
    plain = {side: step(subject, loaded, side) for side in sides}
    started = time.perf_counter()
    try:
        report = subject.pipeline().compile(CompilePlan(mode="blocks", sizes=square(sides)))
        section["compile_s"] = round(time.perf_counter() - started, 1)
        section["problems"] = list(report.failures)
        if report.mode == "off":
            raise NotRun("; ".join(report.failures) or "nothing was compiled")
        section["graphs"] = report.graphs
        section["sides"] = _against_plain(subject, loaded, plain)
    finally:
        if loaded.engine.compiled is not None:
            loaded.engine.compiled.remove("measured")
        loaded.engine.compiled = None


def _against_plain(
    subject: Subject, loaded: Loaded, plain: Mapping[int, dict[str, Any]]
) -> dict[str, Any]:
    found = {side: step(subject, loaded, side) for side in plain}
    return {
        str(side): {
            "step": found[side],
            "plain": plain[side],
            "ratio_to_plain": ratio(found[side], plain[side]),
        }
        for side in plain
    }


def several_images(subject: Subject, section: Section, alone: Mapping[str, Any]) -> None:
    """``SHARED_BATCH`` images of one request, denoised together."""
    batch = SHARED_BATCH
    loaded, side = subject.load(), subject.scale.side
    found = measured(subject, side, batch=batch, repeats=1, num_images=batch)
    section.update({**found, "images": batch, "step": step(subject, loaded, side, batch)})
    section["per_image_s"] = round(found["median_s"] / batch, 4)
    section["ratio_to_one_by_one"] = _ratio({"median_s": section["per_image_s"]}, alone)


def two_pictures(subject: Subject, section: Section, alone: Mapping[str, Any]) -> None:
    """A variation of two pictures at half strength."""
    request: dict[str, Any] = {"images": (a_picture(1),), "redux_strength": 0.5}
    section.update(measured(subject, subject.scale.side, **request))
    section.update(pictures=2, strength=0.5, ratio_to_one_picture=_ratio(section, alone))


# --- what they share ------------------------------------------------------------------------------


def describe(subject: Subject, loaded: Loaded) -> dict[str, Any]:
    """What runs: dtypes, operators, attention, plan, and how long it took to make."""
    return {
        "dtype": loaded.components.dtype_name,
        "load_s": loaded.load_s,
        "resident_bytes": _allocated(subject),
        "chosen": dict(loaded.chosen),
    }


def measured(
    subject: Subject,
    side: int,
    *,
    is_fp8: bool = False,
    batch: int = 1,
    repeats: int | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """The first image, then the median of ``repeats`` with other seeds; bytes at the peak.

    Raises ``NotRun`` for what the memory plan has no room for.
    """
    pipeline = subject.pipeline(is_fp8=is_fp8, batch=batch)
    try:
        first, _ = _one(subject, pipeline, side, 0, fields)
    except RequestError as error:
        raise NotRun(str(error)) from error
    if subject.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(subject.device)
    count = repeats or subject.scale.repeats
    runs = [_one(subject, pipeline, side, 1 + i, fields) for i in range(count)]
    last = runs[-1][1]
    return {
        "side": side,
        "steps": subject.scale.steps,
        "first_s": round(first, 4),
        "median_s": round(statistics.median(seconds for seconds, _ in runs), 4),
        "count": len(runs),
        "stages": {name: round(seconds, 4) for name, seconds in last.timings.items()},
        "peak_bytes": _peak(subject),
        "mode": subject.load(is_fp8=is_fp8).components.plan.mode,
        "is_fp8": is_fp8,
    }


def _one(
    subject: Subject, pipeline: ReduxPipeline, side: int, seed: int, fields: Mapping[str, Any]
) -> tuple[float, Result]:
    request = GenerationRequest(
        a_picture(),
        width=side,
        height=side,
        seed=seed,
        num_inference_steps=subject.scale.steps,
        **fields,
    )
    synchronize(subject.device)
    started = time.perf_counter()
    *_, result = pipeline.generate(request)
    synchronize(subject.device)
    assert isinstance(result, Result)
    return time.perf_counter() - started, result


@torch.inference_mode()
def step(subject: Subject, loaded: Loaded, side: int, batch: int = 1) -> dict[str, Any]:
    """One step of the loaded transformer: ``device_ms``, ``host_ms``."""
    given = subject.conditioning(loaded.components)
    prepared, img = subject.step_of(loaded.engine, given, side, batch)
    return measure(lambda: prepared.predict(img, STEP), subject.device, subject.scale.calls)


def _fewer(subject: Subject) -> int:
    """Repeats of what matters less than the main image."""
    return max(1, subject.scale.repeats - 1)


def square(sides: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Widths and heights."""
    return tuple((side, side) for side in sides)


def _require_cuda(subject: Subject) -> None:
    if subject.device.type != "cuda":
        raise NotRun(NEEDS_CUDA)


def _ratio(of: Mapping[str, Any], to: Mapping[str, Any] | None) -> float | None:
    """Of two images' medians; None where the other was not measured."""
    if not to or "median_s" not in to:
        return None
    return round(float(of["median_s"]) / float(to["median_s"]), 4)


def _allocated(subject: Subject) -> int | None:
    return torch.cuda.memory_allocated(subject.device) if subject.device.type == "cuda" else None


def _peak(subject: Subject) -> int | None:
    if subject.device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(subject.device)
