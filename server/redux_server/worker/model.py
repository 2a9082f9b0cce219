"""How a worker loads its model, and what it is asked to compile.

Torch and metrics are loaded where a worker loads its model, and not before: ``flux-redux doctor``
and ``generate`` use the rest without them. Knows no task and no database.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

import structlog
from PIL import Image

from redux_pipelines.contract.types import (
    CompileMode,
    CompilePlan,
    CompileReport,
    GenerationRequest,
    ModelInfo,
    Pipeline,
    SafetyChecker,
    Sizes,
)
from redux_pipelines.errors import DeviceMemoryError, RequestError
from redux_server import __version__
from redux_server.parameters import ALLOWED, parse_size
from redux_server.settings import ModelSettings, ServerSettings, UsageError

_log = structlog.get_logger("redux_server.worker.model")


def load(settings: ModelSettings, device: str) -> Pipeline:
    """The pipeline of ``settings``, in a process whose allocators are ours to set.

    Raises what ``load_pipeline`` does.
    """
    from redux_pipelines.loading.load import WITHOUT_NETWORK, load_pipeline
    from redux_pipelines.memory.malloc import keep_freed_memory

    has_network = bool(settings.base) or settings.model not in WITHOUT_NETWORK
    if has_network and device != "cpu" and settings.parallel == 1:  # NCCL shares memory its own way
        from redux_pipelines.devices import grow_segments

        _log.debug("allocator", grows_segments=grow_segments(device))
    pipeline = load_pipeline(**{**settings.pipeline_options(), "device": device})
    if pipeline.info.device == "cpu":
        keep_freed_memory()
    return pipeline


def load_model(
    settings: ServerSettings,
    device: str,
    learn: Callable[[int, float], None] = lambda pixels, seconds: None,
) -> tuple[Pipeline, SafetyChecker]:
    """The pipeline and the safety checker that ``settings`` ask for, warmed up.

    ``learn`` is told the pixels of each image of the warm-up, and the seconds it took.
    """
    from redux_pipelines.images.safety import OpenNsfwChecker

    started = time.perf_counter()
    pipeline = load(settings, device)
    safety = OpenNsfwChecker(threshold=settings.safety_threshold)
    sizes = warm_sizes(settings, pipeline.info.device)
    if is_compiled(settings, pipeline.info):
        _compile(pipeline, compile_plan(settings, sizes))
    for width, height, seconds in _warm_up(pipeline, safety, sizes):
        learn(width * height, seconds)
    _log.info("model loaded", seconds=round(time.perf_counter() - started, 1))
    return pipeline, safety


def _compile(pipeline: Pipeline, plan: CompilePlan) -> None:
    """Before the first task, so that it need not wait; what fails is left out, and said."""
    from redux_server import metrics

    report = pipeline.compile(plan)
    metrics.COMPILED.set(report.mode != "off")
    for failure in report.failures:
        metrics.COMPILE_FAILURES.inc()
        _log.warning("running without", reason=failure)
    _log.info("compiled", **asdict(report))


def _warm_up(
    pipeline: Pipeline, safety: SafetyChecker, sizes: Sizes
) -> Iterator[tuple[int, int, float]]:
    """Make an image of one step of each size, so that no task pays for what is set up once.

    Yields each size that was made, and the seconds it took.

    That is what is loaded when first used and, on a GPU, what libraries plan and the allocator
    keeps for a shape. A size that there is no room for is passed over, as its requests will be.
    """
    for width, height in sizes:
        started = time.perf_counter()
        request = GenerationRequest(
            Image.new("RGB", (64, 64), "gray"), width=width, height=height, num_inference_steps=1
        )
        size = f"{width}x{height}"
        try:
            *_, result = pipeline.generate(request)
        except (RequestError, DeviceMemoryError) as error:
            _log.warning("not warmed up", size=size, reason=str(error))
            continue
        seconds = time.perf_counter() - started
        safety.check(result.images)  # type: ignore[union-attr]  # the last event is the result
        _log.info("warmed up", size=size, seconds=round(time.perf_counter() - started, 2))
        yield width, height, seconds


def warm_sizes(settings: ModelSettings, device: str) -> Sizes:
    """What ``--warm-sizes`` names, or what suits ``device``.

    A CPU plans nothing by shape: there a small picture loads all that is needed.

    Raises:
        UsageError: a size that cannot be generated.
    """
    if not settings.warm_sizes:
        return ((512, 512),) if device == "cpu" else ((1024, 1024),)
    try:
        sizes = (parse_size(each) for each in settings.warm_sizes.split(","))
        return tuple(dict.fromkeys(sizes))
    except ValueError:
        allowed = ALLOWED["size"].replace("*", "x")
        raise UsageError(
            f"--warm-sizes must be sizes separated by commas, each {allowed}; got "
            f"{settings.warm_sizes!r}"
        ) from None


def describe_model(pipeline: Pipeline, settings: ServerSettings) -> str:
    """What was loaded, in one line for ``/readyz``."""
    info = pipeline.info
    attention = f" with {info.attention} attention" if info.attention else ""
    text = f"{info.name}, {info.backend} backend{attention}, {info.dtype} on {info.device}"
    if info.parallel > 1:
        text = f"{text} and {info.parallel - 1} more for each image"
    if info.compiled != "off":
        return f"{text}, compiled ({info.compiled})"
    return text if settings.compile == "off" else f"{text}, not compiled: its log says why"


# --- Compilation ----------------------------------------------------------------------------------


def wants_compile(settings: ModelSettings) -> bool:
    """Whether somebody asked for anything to be done between loading and the first request."""
    return settings.compile != "off" or settings.graphs not in (0, "auto")


def is_compiled(settings: ModelSettings, info: ModelInfo) -> bool:
    """Whether there is anything to do then for what was loaded: CUDA graphs are there by default.

    ``auto`` has none on a CPU and none for other backends than the engine, and says nothing of it.
    """
    has_graphs = info.device.startswith("cuda") and settings.backend == "engine"
    return wants_compile(settings) or (has_graphs and settings.graphs == "auto")


def check_warm_up(settings: ModelSettings) -> None:
    """Raise ``UsageError`` for settings that cannot go together, or sizes that cannot be tried."""
    warm_sizes(settings, settings.device)
    if wants_compile(settings) and settings.backend != "engine":
        raise UsageError(
            f"--compile and --cuda-graphs need --backend engine, got {settings.backend!r}"
        )


def check_parallel(settings: ModelSettings) -> None:
    """Raise ``UsageError`` for what several GPUs for one image do not go with."""
    from redux_pipelines.loading.load import WITHOUT_NETWORK

    if settings.parallel == 1:
        return
    if not settings.base and settings.model in WITHOUT_NETWORK:
        raise UsageError(f"--parallel needs a network to share out; {settings.model} has none")
    if settings.backend != "engine":
        raise UsageError(f"--parallel needs --backend engine, got {settings.backend!r}")
    if settings.memory not in ("auto", "resident"):
        raise UsageError(
            f"--parallel keeps all weights on each GPU: --memory is resident then, or auto, not "
            f"{settings.memory}"
        )
    if wants_compile(settings):
        raise UsageError("--parallel goes with neither --compile nor --cuda-graphs; leave them out")


def compile_plan(settings: ModelSettings, sizes: Sizes) -> CompilePlan:
    """What ``settings`` ask for, tried at ``sizes``: widths and heights."""
    return CompilePlan(
        mode=cast(CompileMode, settings.compile),
        sizes=sizes,
        cuda_graphs=settings.graphs,
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
        yield f"CUDA graphs of up to {report.cuda_graphs} shapes"
    yield from report.failures
