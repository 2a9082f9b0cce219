"""``flux-redux generate`` and ``warmup``: the model in this process, without a server.

``generate`` makes the images of one request, in the API's words for parameters and with the
worker's pipeline and safety checker. ``warmup`` compiles now, so that the next start of a worker
need not. Both load torch only after everything that can be refused early has been checked.
"""

import io
import json
import re
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from redux_pipelines.contract.types import (
    GenerationRequest,
    ModelInfo,
    OutputFormat,
    Pipeline,
    Quality,
    Result,
    SafetyChecker,
)
from redux_pipelines.errors import ImageError, ReduxError
from redux_pipelines.images.files import encode
from redux_pipelines.images.rgb import to_rgb
from redux_server.cli.client import ClientError, make_folder, save
from redux_server.cli.progress import ProgressReport, note
from redux_server.cli.submit import note_caveat, read_parameters
from redux_server.dispatch.local import devices
from redux_server.pictures.decode import DecoderUnavailable, decode_image, sniff
from redux_server.settings import ModelSettings, UsageError
from redux_server.worker import model
from redux_server.worker.inputs import Pictures, generation_request
from redux_server.worker.model import (
    cache_dir,
    check_parallel,
    check_warm_up,
    compile_plan,
    describe_report,
    wants_compile,
    warm_sizes,
)
from redux_server.worker.outputs import provenance

_FORMATS: dict[str, OutputFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}
_STAGES = ("load_s", "encode_s", "denoise_s", "decode_s", "safety_s")


@dataclass(frozen=True, slots=True)
class _Generated:
    """Images fit to be shown, and how they came about. ``timings`` are seconds by stage."""

    images: tuple[Image.Image, ...]
    seeds: tuple[int, ...]
    flags: tuple[bool, ...]
    info: ModelInfo
    timings: dict[str, float]
    quality: Quality
    reused_steps: int


def generate(
    settings: ModelSettings,
    *,
    image: str,
    images: Sequence[str],
    mask: str,
    out: str,
    as_json: bool,
    **parameters: Any,
) -> int:
    """Make variations of one picture and write them; returns the exit code.

    ``parameters`` are those of a request that the flags named, pictures aside.

    Raises:
        UsageError: a parameter or path that cannot be used; nothing slow was done.
    """
    check_warm_up(settings)
    check_parallel(settings)
    if settings.graphs == "auto":  # to capture a graph takes longer than it saves in one image
        settings = replace(settings, cuda_graphs="0")
    asked = read_parameters(parameters, images=images, output_format=_format_of(Path(out)))
    wanted = asked.parameters()
    paths = _output_paths(Path(out), wanted["num_images"], asked.output_format)
    try:
        request = generation_request(wanted, _open_pictures(image, images, mask))
        make_folder(paths[0].parent)
        generated = _generate(request, settings, is_checked=asked.enable_safety_checker)
        for path, each, seed in zip(paths, generated.images, generated.seeds, strict=True):
            chunks = provenance(generated.info, request, seed=seed, quality=generated.quality)
            save(path, encode(each, chunks, asked.output_format))
    except (ReduxError, ClientError) as error:
        note(str(error))
        return 1
    _report(generated, paths, as_json=as_json)
    return 0


def _format_of(out: Path) -> OutputFormat | None:
    """The kind of file that a name stands for."""
    return _FORMATS.get(out.suffix.lower())


def _output_paths(out: Path, count: int, kind: OutputFormat) -> list[Path]:
    """``OUT.png``, or ``OUT-0.png``, ``OUT-1.png``... for several images."""
    if _format_of(out) != kind or out.is_dir():
        names = " or ".join(suffix for suffix, each in _FORMATS.items() if each == kind)
        raise UsageError(
            f"--out must be the name of a {names} file (--output-format {kind}), got {str(out)!r}"
        )
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(count)]


def _open_pictures(image: str, images: Sequence[str], mask: str) -> Pictures:
    opened = _open_picture(mask) if mask else None
    return Pictures(_open_picture(image), tuple(map(_open_picture, images)), opened)


def _open_picture(source: str) -> Image.Image:
    if re.match(r"https?://", source, re.IGNORECASE):
        raise UsageError("generate takes a file; download the picture, or use `flux-redux submit`")
    try:
        data = Path(source).read_bytes()
        if sniff(data):  # as a server sees it
            return decode_image(data)
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise ImageError(f"no such file: {source}") from None
    except (
        OSError,
        ValueError,
        Image.DecompressionBombError,
        ImageError,
        DecoderUnavailable,
    ) as error:
        raise ImageError(f"cannot read {source} as a picture: {error}") from None


def _generate(
    request: GenerationRequest, settings: ModelSettings, *, is_checked: bool
) -> _Generated:
    from redux_pipelines.images.safety import NullChecker, OpenNsfwChecker, black_out

    started = time.perf_counter()
    note(f"loading {settings.base or settings.model} ...")
    pipeline = load(settings)
    if wants_compile(settings):
        report = pipeline.compile(compile_plan(settings, ((request.width, request.height),)))
        for failure in report.failures:
            note(failure)
    checker: SafetyChecker = (
        OpenNsfwChecker(threshold=settings.safety_threshold) if is_checked else NullChecker()
    )
    loaded = time.perf_counter()
    note(f"seed {request.seed}")
    result = _denoise(pipeline, request)
    denoised = time.perf_counter()
    flags = checker.check(result.images)
    safety_s = time.perf_counter() - denoised
    timings = {**result.timings, "load_s": loaded - started, "safety_s": safety_s}
    return _Generated(
        images=black_out(result.images, flags),
        seeds=result.seeds,
        flags=flags,
        info=pipeline.info,
        timings={stage: round(timings.get(stage, 0.0), 4) for stage in _STAGES},
        quality=result.quality,
        reused_steps=result.reused_steps,
    )


def load(settings: ModelSettings) -> Pipeline:
    """The pipeline of ``settings``. Raises ``UsageError`` for what this machine lacks."""
    try:
        return model.load(settings, settings.device)
    except ValueError as error:  # an option this machine cannot serve, such as --device cuda
        raise UsageError(str(error)) from error


def _denoise(pipeline: Pipeline, request: GenerationRequest) -> Result:
    with closing(ProgressReport()) as progress:
        for event in pipeline.generate(request):
            if isinstance(event, Result):
                return event
            progress.show("step", event.step, event.total_steps)
    raise RuntimeError("the pipeline ended without a result")


def _report(generated: _Generated, paths: list[Path], *, as_json: bool) -> None:
    note_caveat(generated.info.name)
    for path, is_flagged in zip(paths, generated.flags, strict=True):
        if is_flagged:
            note(f"{path} is black: the safety checker withheld the image")
        print(path)
    if as_json:
        summary = {
            "seed": generated.seeds[0],
            "seeds": generated.seeds,
            "files": [str(path) for path in paths],
            "has_nsfw_contents": generated.flags,
            "model": generated.info.name,
            "quality": generated.quality,
            "reused_steps": generated.reused_steps,
            "timings": generated.timings,
        }
        print(json.dumps(summary))


# --- Compiling ahead ------------------------------------------------------------------------------


def warmup(settings: ModelSettings) -> int:
    """Load, compile, compare, keep; prints seconds by stage. 1 if less than asked for was done.

    Raises:
        UsageError: settings with nothing to do, or a size that cannot be generated.
    """
    check_warm_up(settings)
    check_parallel(settings)
    if not wants_compile(settings):
        raise UsageError("nothing to warm up: give --compile full (or blocks), or --cuda-graphs N")
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
    sizes = warm_sizes(settings, pipeline.info.device)
    report = pipeline.compile(compile_plan(settings, sizes))
    for line in describe_report(report):
        print(line)
    return 1 if report.failures else 0
