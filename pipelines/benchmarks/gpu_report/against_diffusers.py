"""The engine's step against diffusers' own transformer: same weights, same request, same run.

At full depth, calls in turns; diffusers' eager, and with its blocks compiled as its documentation
says. Says also how far the two are apart.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from gpu_report.clock import alternating, ratio
from gpu_report.correctness import diffusers_model, relative_error
from gpu_report.images import NEEDS_CUDA
from gpu_report.runner import NotRun, Section
from gpu_report.subject import STEP, Subject
from redux_pipelines.denoising.diffusers_backend import DiffusersDenoiser
from redux_pipelines.devices import is_final

ACTIVATIONS_BYTES = 4 * 10**9
"""Of diffusers' network at 1024 × 1024; an estimate to skip by, not a measurement."""


@torch.inference_mode()
def against_diffusers(subject: Subject, section: Section, save: Callable[[], None]) -> None:
    """Both at the main side; both weights are on the device at once."""
    loaded, side = subject.load(), subject.scale.side
    _require_room(subject)
    given = subject.conditioning(loaded.components)
    model = diffusers_model(subject, dict(subject.scale.transformer), subject.dtype)
    engine, img = subject.step_of(loaded.engine, given, side)
    theirs, _ = subject.step_of(DiffusersDenoiser(model), given, side)

    def both() -> list[dict[str, Any]]:
        calls = (lambda: engine.predict(img, STEP), lambda: theirs.predict(img, STEP))
        return alternating(calls, subject.device, subject.scale.calls)

    section.update(side=side, dtype=str(subject.dtype).removeprefix("torch."))
    distance = relative_error(engine.predict(img, STEP), theirs.predict(img, STEP))
    section["relative_difference"] = distance
    section["engine"], section["eager"] = both()
    section["ratio_to_eager"] = ratio(section["engine"], section["eager"])
    save()
    if subject.device.type != "cuda":
        section["compiled"] = {"not_run": NEEDS_CUDA}
        return
    section["compiled"] = _compiled(model, lambda: theirs.predict(img, STEP), both)


def _compiled(
    model: Any, step: Callable[[], object], both: Callable[[], list[dict[str, Any]]]
) -> dict[str, Any]:
    """Diffusers' with its kinds of blocks compiled, for this size; ours as it is."""
    started = time.perf_counter()
    try:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        step()
        compile_s = round(time.perf_counter() - started, 1)
        ours, theirs = both()
    except RuntimeError as error:  # the compiler's; the rest of the stage stands
        if is_final(error):
            raise
        return {"not_run": f"{type(error).__name__}: {str(error)[:500]}"}
    return {
        "compile_s": compile_s,
        "step": theirs,
        "engine": ours,
        "ratio_engine_to_compiled": ratio(ours, theirs),
    }


def _require_room(subject: Subject) -> None:
    if subject.device.type != "cuda":
        return
    element = subject.dtype.itemsize
    needed = subject.sizes.transformer.parameters * element + ACTIVATIONS_BYTES
    free, _ = torch.cuda.mem_get_info(subject.device)
    free += torch.cuda.memory_reserved(subject.device) - torch.cuda.memory_allocated(subject.device)
    if free < needed:
        raise NotRun(
            f"needs about {needed / 1e9:.0f} GB beside the engine's weights, "
            f"{free / 1e9:.0f} GB are free"
        )
