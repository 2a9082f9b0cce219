"""How a worker loads its model, and what it is asked to compile.

Torch and metrics are loaded where a worker loads its model, and not before: ``flux-redux doctor``
and ``generate`` use the rest without them. Knows no task and no database.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

import structlog
from PIL import Image

from redux_pipelines.contract.types import (
    WARM_UP_SIZES,
    CompileMode,
    CompilePlan,
    CompileReport,
    GenerationRequest,
    Pipeline,
    SafetyChecker,
)
from redux_server import __version__
from redux_server.settings import ModelSettings, ServerSettings, UsageError

_log = structlog.get_logger("redux_server.worker.model")


def load_model(settings: ServerSettings, device: str) -> tuple[Pipeline, SafetyChecker]:
    """The pipeline and the safety checker that ``settings`` ask for, warmed up."""
    from redux_pipelines.images.safety import OpenNsfwChecker
    from redux_pipelines.loading.load import load_pipeline
    from redux_pipelines.memory.malloc import keep_freed_memory

    started = time.perf_counter()
    pipeline = load_pipeline(**{**settings.pipeline_options(), "device": device})
    if pipeline.info.device == "cpu":
        keep_freed_memory()
    safety = OpenNsfwChecker(threshold=settings.safety_threshold)
    if wants_compile(settings):
        _compile(pipeline, settings)
    _warm_up(pipeline, safety)
    _log.info("model loaded", seconds=round(time.perf_counter() - started, 1))
    return pipeline, safety


def _compile(pipeline: Pipeline, settings: ServerSettings) -> None:
    """Before the first task, so that it need not wait; what fails is left out, and said."""
    from redux_server import metrics

    report = pipeline.compile(compile_plan(settings))
    metrics.COMPILED.set(report.mode != "off")
    for failure in report.failures:
        metrics.COMPILE_FAILURES.inc()
        _log.warning("running without", reason=failure)
    _log.info("compiled", **asdict(report))


def _warm_up(pipeline: Pipeline, safety: SafetyChecker) -> None:
    """Make one small image, so that the first task does not pay for lazy start-up."""
    request = GenerationRequest(
        Image.new("RGB", (64, 64), "gray"), width=512, height=512, num_inference_steps=1
    )
    *_, result = pipeline.generate(request)
    safety.check(result.images)  # type: ignore[union-attr]  # the last event is the result


def describe_model(pipeline: Pipeline, settings: ServerSettings) -> str:
    """What was loaded, in one line for ``/readyz``."""
    info = pipeline.info
    attention = f" with {info.attention} attention" if info.attention else ""
    text = f"{info.name}, {info.backend} backend{attention}, {info.dtype} on {info.device}"
    if info.compiled != "off":
        return f"{text}, compiled ({info.compiled})"
    return text if settings.compile == "off" else f"{text}, not compiled: its log says why"


# --- Compilation ----------------------------------------------------------------------------------


def wants_compile(settings: ModelSettings) -> bool:
    """Whether there is anything to do between loading and the first request."""
    return settings.compile != "off" or settings.cuda_graphs > 0


def check_compile(settings: ModelSettings) -> None:
    """Raise ``UsageError`` for settings that cannot go together."""
    if wants_compile(settings) and settings.backend != "engine":
        raise UsageError(
            f"--compile and --cuda-graphs need --backend engine, got {settings.backend!r}"
        )


def compile_plan(
    settings: ModelSettings, sizes: tuple[tuple[int, int], ...] = WARM_UP_SIZES
) -> CompilePlan:
    """What ``settings`` ask for, tried at ``sizes``: widths and heights."""
    return CompilePlan(
        mode=cast(CompileMode, settings.compile),
        sizes=sizes,
        cuda_graphs=settings.cuda_graphs,
        cache_dir=cache_dir(),
        version=__version__,
    )


def cache_dir() -> Path | None:
    """``$XDG_CACHE_HOME/flux-redux/compile``; None for a user without a home directory."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return root.absolute() / "flux-redux" / "compile"


def describe_report(report: CompileReport) -> Iterator[str]:
    """A line per stage, then what came of it."""
    for stage, seconds in report.seconds.items():
        yield f"{stage}: {seconds:.1f} s"
    if report.mode != "off":
        yield (
            f"compiled ({report.mode}): {report.graphs} graphs, of which {report.reused} were kept "
            "from before"
        )
    if report.cuda_graphs:
        yield f"CUDA graphs for up to {report.cuda_graphs} shapes"
    yield from report.failures
