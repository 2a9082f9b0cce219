"""``flux-redux warmup``: compile the model now, so that the next start of a worker need not."""

import argparse
import time
from dataclasses import replace

from redux_pipelines.errors import ReduxError
from redux_server.cli import UsageError
from redux_server.client import note
from redux_server.compile_plan import (
    cache_dir,
    check_compile,
    compile_plan,
    describe_report,
    wants_compile,
)
from redux_server.engine import devices
from redux_server.generate import load
from redux_server.schemas import ALLOWED, parse_size
from redux_server.settings import ModelSettings


def warmup(given: argparse.Namespace, settings: ModelSettings) -> int:
    """Load, compile, compare, keep; prints seconds by stage. 1 if less than asked for was done.

    Raises:
        UsageError: settings with nothing to do, or a size that cannot be made.
    """
    check_compile(settings)
    if not wants_compile(settings):
        raise UsageError("nothing to warm up: give --compile full (or blocks), or --cuda-graphs N")
    sizes = _parse_sizes(given.sizes)
    started = time.perf_counter()
    note(f"loading {settings.base or settings.model} ...")
    try:
        # Compiled code is kept by the kind of device: one of several equal GPUs is enough.
        pipeline = load(replace(settings, device=devices(settings.device)[0]))
    except ReduxError as error:
        note(str(error))
        return 1
    print(f"load the model: {time.perf_counter() - started:.1f} s", flush=True)
    if cache_dir() is None:
        note("this user has no home directory, so nothing is kept; set XDG_CACHE_HOME")
    report = pipeline.compile(compile_plan(settings, sizes))
    for line in describe_report(report):
        print(line)
    return 1 if report.failures else 0


def _parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        return tuple(parse_size(each) for each in text.split(","))
    except ValueError:
        allowed = ALLOWED["size"].replace("*", "x")
        raise UsageError(f"--sizes must be sizes separated by commas, each {allowed}") from None
