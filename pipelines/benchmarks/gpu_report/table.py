"""What a report says, for people: the lines that end a run. Knows no Markdown and no document."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Section = Mapping[str, Any]
Lines = Iterator[tuple[str, str]]


def table(report: Section) -> str:
    """A line for each figure, then what was not run and what failed."""
    lines = [
        (f"{name}: {what}", figure)
        for name, make in _SECTIONS.items()
        for what, figure in _lines(report, name, make)
    ]
    width = max((len(what) for what, _ in lines), default=0)
    text = [f"{what:{width}}  {figure}" for what, figure in lines]
    text += [f"FAILED {name}: {_last_line(why)}" for name, why in report["failures"].items()]
    return "\n".join(text)


def _lines(report: Section, name: str, make: Callable[[Section], Lines]) -> Lines:
    section = report.get(name)
    if not section:
        return
    if "not_run" in section:
        yield "not run", section["not_run"]
        return
    try:
        yield from make(section)
    except (KeyError, TypeError) as missing:  # failed half way, or numbers that are none
        yield "incomplete", str(missing)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def _ms(timing: Section) -> str:
    device_ms = timing["device_ms"]
    on_device = "" if device_ms is None else f"{device_ms:.2f} ms on the device, "
    return f"{on_device}{timing['host_ms']:.2f} ms on the host"


def _image(image: Section) -> str:
    peak = image["peak_bytes"]
    memory = "" if peak is None else f", peak {peak / 1e9:.1f} GB"
    return f"{image['median_s']:.3f} s (first {image['first_s']:.3f} s){memory}"


def _gpu_tests(section: Section) -> Lines:
    counts = [f"{section[each]} {each}" for each in ("passed", "skipped")]
    yield "tests", f"{', '.join(counts)}, {section['failed_count']} failed"


def _operators(section: Section) -> Lines:
    for kind, error in (("kernels", "share_of_tolerance"), ("attention", "worst_query_error")):
        for name, found in section[kind].items():
            text = found["refused"] or f"right, {error.replace('_', ' ')} {found[error]:.2g}"
            yield f"{kind} {name}", text


def _blocks(section: Section) -> Lines:
    for name, error in section["errors"].items():
        yield f"{name} against float32", f"{error:.2g}"


def _one_image(section: Section) -> Lines:
    if "load_s" in section:
        chosen = section["chosen"]
        yield "made in", f"{section['load_s']:.1f} s ({section['dtype']})"
        yield "runs on", f"{chosen['operators']}, attention {chosen['attention']}"
    yield f"{section['side']}²", _image(section)
    if "step" in section:
        yield "a step", _ms(section["step"])


def _by_side(section: Section) -> Lines:
    if "load_s" in section:
        yield "made in", f"{section['load_s']:.1f} s ({section['dtype']})"
    for side, image in section["sides"].items():
        yield f"{side}²", _image(image)
        yield f"{side}², a step", _ms(image["step"])


def _diffusers(section: Section) -> Lines:
    yield "relative difference", f"{section['relative_difference']:.2g}"
    yield "a step of ours", _ms(section["engine"])
    yield "a step of diffusers'", _ms(section["eager"])
    yield "ours / diffusers'", f"{section['ratio_to_eager']:.3f}"
    compiled = section["compiled"]
    if "not_run" in compiled:
        yield "diffusers' compiled", compiled["not_run"]
    else:
        yield "a step of diffusers' compiled", _ms(compiled["step"])
        yield "ours / diffusers' compiled", f"{compiled['ratio_engine_to_compiled']:.3f}"


def _against_plain(section: Section) -> Lines:
    for side, found in section["sides"].items():
        yield f"{side}², a step", _ms(found["step"])
        yield f"{side}², of the plain step", f"{found['ratio_to_plain']:.3f}"


def _step_cache(section: Section) -> Lines:
    forced = section["forced"]
    reused = f"{forced['reused_steps']} of {section['steps']} steps reused, forced"
    yield "all steps", f"{forced['denoise_s']:.3f} s, {reused}"
    yield "of exact", f"{section['ratio_to_exact']:.3f}"


def _batch(section: Section) -> Lines:
    yield f"{section['images']} images", _image(section)
    yield "per image", f"{section['per_image_s']:.3f} s"


def _attention(section: Section) -> Lines:
    for rows, found in section["rows"].items():
        for name, speed in found.items():
            yield f"{name}, {rows} rows", f"{_ms(speed)}, {speed['tflops']:.4g} TFLOP/s"
    yield "refused", ", ".join(section["refused"]) or "none"


def _row_kernels(section: Section) -> Lines:
    yield "a copy", f"{section['copy_gb_per_s']:.0f} GB/s"
    for name, found in section["kernels"].items():
        yield (
            name,
            (
                f"{1000 * found['kernel_ms']:.1f} µs, {found['gb_per_s']:.0f} GB/s, "
                f"{found['ratio_to_torch']:.3f} of torch"
            ),
        )


def _products(section: Section) -> Lines:
    yield "a large one", f"{section['peak']['tflops']:.4g} TFLOP/s"
    if section["fp8_peak"] is not None:
        yield "a large one in fp8", f"{section['fp8_peak']['tflops']:.4g} TFLOP/s"
    for name, kinds in section["products"].items():
        for kind, found in kinds.items():
            share = f"{found['share_of_peak']:.0%} of the large one"
            yield f"{name}, {kind}", f"{found['tflops']:.4g} TFLOP/s, {share}"


def _profile(section: Section) -> Lines:
    for each in section["longest"][:8]:
        yield (
            f"{each['name'][:60]}, {each['calls']} calls",
            f"{each['ms']:.2f} ms, {each['share']:.0%}",
        )


def _memory(section: Section) -> Lines:
    for label, found in section["images"].items():
        planned, measured = found["planned_bytes"] / 1e9, found["measured_bytes"] / 1e9
        yield label, f"{measured:.2f} GB at the peak, {planned:.2f} GB planned"


def _server(section: Section) -> Lines:
    yield (
        f"{section['requests']} requests",
        (
            f"{section['whole_s']:.2f} s, {section['per_request_s']:.3f} s each, "
            f"{section['completed']} completed"
        ),
    )


_SECTIONS: Mapping[str, Callable[[Section], Lines]] = {
    "gpu_tests": _gpu_tests,
    "operators": _operators,
    "blocks": _blocks,
    "image": _one_image,
    "sides": _by_side,
    "fp8": _by_side,
    "diffusers": _diffusers,
    "graphs": _against_plain,
    "step_cache": _step_cache,
    "compile": _against_plain,
    "batch": _batch,
    "two_pictures": _one_image,
    "attention": _attention,
    "row_kernels": _row_kernels,
    "products": _products,
    "profile": _profile,
    "memory": _memory,
    "server": _server,
}
