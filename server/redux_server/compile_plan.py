"""From settings to what a pipeline is to compile, and from its report to words. No torch here."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from redux_pipelines.types import WARM_UP_SIZES, CompileMode, CompilePlan, CompileReport
from redux_server import __version__
from redux_server.cli import UsageError
from redux_server.settings import ModelSettings


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
            f"from before; read {report.loaded_bytes:,} bytes, wrote {report.saved_bytes:,}"
        )
    if report.cuda_graphs:
        yield f"CUDA graphs for up to {report.cuda_graphs} shapes"
    yield from report.failures
