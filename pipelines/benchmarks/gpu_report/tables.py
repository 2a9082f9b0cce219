"""``make gpu-tables``: the GPU figures of README and docs, from one committed report.

Everything between the marks of a place is written from ``docs/benchmarks/gpu-report.json``; where
there is no report, or a stage did not end well in it, the cell says ``not measured``. No figure is
written by hand. Imports no torch.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_report import schema
from gpu_report.paths import ROOT
from training.documents import markdown_table, place_figures

REPORT = ROOT / "docs/benchmarks/gpu-report.json"
NOT_MEASURED = "not measured"
NEVER = "–"
"""Where no stage measures it."""
COMMAND = "`make gpu-report`"
Report = Mapping[str, Any] | None
Cell = Callable[[Mapping[str, Any]], str]


def main(arguments: Sequence[str]) -> int:
    """Write all places; 1 where the report is not one to take figures from."""
    if arguments:
        print(f"gpu-tables takes no arguments; it reads {REPORT}", file=sys.stderr)
        return 2
    report = read(REPORT)
    if report is not None and (reason := refusal(report)) is not None:
        print(f"{REPORT}: {reason}", file=sys.stderr)
        return 1
    for (document, name), make in PLACES.items():
        place_figures(ROOT / document, name, make(report))
    return 0


def read(path: Path) -> Report:
    """The report, or None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def refusal(report: Mapping[str, Any]) -> str | None:
    """Why figures must not come from ``report``, or None."""
    if found := schema.problems(report):
        return f"it is not as it should be: {'; '.join(found[:3])}"
    if report["device"] != "cuda" or report["scale"] != "full":
        return f"it is of {report['device']} in {report['scale']} size, and figures are of a GPU's"
    return None


# --- cells ----------------------------------------------------------------------------------------


def cell(report: Report, stage: str, make: Cell) -> str:
    """What ``make`` says of a stage's section, if that ran to its end."""
    section = {} if report is None else report.get(stage, {})
    is_whole = report is not None and stage in report["stages_s"]
    if not is_whole or report is None or stage in report["failures"] or "not_run" in section:
        return NOT_MEASURED
    return make(section)


def heading(report: Report) -> str:
    """On what the figures below were measured, as a paragraph."""
    if report is None:
        return f"Not measured on a GPU yet: {COMMAND} does it.\n\n"
    env = report["environment"]
    gpu, commit = env["gpu"] or {}, (env["commit"] or "unknown")[:12]
    return (
        f"{gpu.get('name', 'a GPU')}, torch {env['torch']}, CUDA {env['cuda']}, triton "
        f"{env['triton']}, Python {env['python']}; version {env['project']}, commit {commit}; "
        f"{report['started'][:10]}, {COMMAND}.\n\n"
    )


def seconds(image: Mapping[str, Any]) -> str:
    """The median of an image."""
    return f"{image['median_s']:.2f} s"


def _at(side: str, make: Cell) -> Cell:
    def of(section: Mapping[str, Any]) -> str:
        image = section["sides"].get(side)
        return NOT_MEASURED if image is None else make(image)

    return of


def _image(image: Mapping[str, Any]) -> str:
    step, peak = image["step"], image["peak_bytes"] / 1e9
    return (
        f"{seconds(image)}; a step {step['device_ms']:.1f} ms, of that the host "
        f"{step['host_ms']:.1f} ms; peak {peak:.1f} GB"
    )


def _ratio(name: str) -> Cell:
    return lambda section: f"{section[name]:.2f}"


def _against_plain(section: Mapping[str, Any]) -> str:
    found = section["sides"].items()
    return ", ".join(f"{each['ratio_to_plain']:.3f} ({side}²)" for side, each in found)


def _compiled(section: Mapping[str, Any]) -> str:
    compiled = section["compiled"]
    if "not_run" in compiled:
        return NOT_MEASURED
    return f"{compiled['ratio_engine_to_compiled']:.2f}"


def _attention(section: Mapping[str, Any]) -> str:
    best = []
    for rows, found in section["rows"].items():
        name = min(found, key=lambda each: found[each]["device_ms"])
        fastest = found[name]
        best.append(
            f"{int(rows):,} rows: {name}, {fastest['device_ms']:.2f} ms, "
            f"{fastest['tflops']:.0f} TFLOP/s"
        )
    return "; ".join(best)


def _kernels(section: Mapping[str, Any]) -> str:
    found = section["kernels"].values()
    ratios = [each["ratio_to_torch"] for each in found]
    shares = [each["share_of_copy"] for each in found]
    return (
        f"{min(ratios):.2f} to {max(ratios):.2f} of torch's time; {min(shares):.0%} to "
        f"{max(shares):.0%} of a copy's {section['copy_gb_per_s']:,.0f} GB/s"
    )


def _products(section: Mapping[str, Any]) -> str:
    text = []
    for kind, peak in (("plain", section["peak"]), ("fp8", section["fp8_peak"])):
        shares = [each[kind]["share_of_peak"] for each in section["products"].values()
                  if kind in each]  # fmt: skip
        if shares:
            text.append(
                f"{kind}: {min(shares):.0%} to {max(shares):.0%} of a large one's "
                f"{peak['tflops']:,.0f} TFLOP/s"
            )
    return "; ".join(text)


def _errors(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {error:.2g}" for name, error in section["errors"].items())


def _tests(section: Mapping[str, Any]) -> str:
    return f"{section['passed']} passed, {section['skipped']} skipped"


def _server(section: Mapping[str, Any]) -> str:
    ratio = section["ratio_to_pipeline"]
    beside = "" if ratio is None else f", {ratio:.2f} of the pipeline's own time"
    return f"{section['per_request_s']:.2f} s a request{beside}"


# --- places ---------------------------------------------------------------------------------------


def speed(report: Report) -> str:
    """README's table."""
    rows = [
        [
            "one 512×512 image",
            cell(report, "sides", _at("512", seconds)),
            cell(report, "fp8", _at("512", seconds)),
        ],
        [
            "one 1024×1024 image",
            cell(report, "image", seconds),
            cell(report, "fp8", _at("1024", seconds)),
        ],
        [
            "one 1536×1536 image",
            cell(report, "sides", _at("1536", seconds)),
            cell(report, "fp8", _at("1536", seconds)),
        ],
        [
            "four 1024×1024 images together, each",
            cell(report, "batch", lambda section: f"{section['per_image_s']:.2f} s"),
            NEVER,
        ],
        [
            "a step's time over diffusers', eager",
            cell(report, "diffusers", _ratio("ratio_to_eager")),
            NEVER,
        ],
        [
            "the same, diffusers' blocks compiled",
            cell(report, "diffusers", _compiled),
            NEVER,
        ],
    ]
    head = ["FLUX.1 [dev] + Redux, 28 steps, random weights", "bfloat16, exact", "fp8"]
    return heading(report) + markdown_table(head, rows)


def everything(report: Report) -> str:
    """A line for each stage."""
    rows = [
        ["tests marked `gpu`", cell(report, "gpu_tests", _tests)],
        ["2 + 3 blocks against diffusers' in float32, relative error",
         cell(report, "blocks", _errors)],
        ["1024², bf16, exact", cell(report, "image", _image)],
        ["making the weights, loading included",
         cell(report, "image", lambda section: f"{section['load_s']:.1f} s")],
        ["512², bf16, exact", cell(report, "sides", _at("512", _image))],
        ["1536², bf16, exact", cell(report, "sides", _at("1536", _image))],
        ["512², fp8", cell(report, "fp8", _at("512", _image))],
        ["1024², fp8", cell(report, "fp8", _at("1024", _image))],
        ["1536², fp8", cell(report, "fp8", _at("1536", _image))],
        ["a step's time over diffusers', eager",
         cell(report, "diffusers", _ratio("ratio_to_eager"))],
        ["the same, diffusers' blocks compiled", cell(report, "diffusers", _compiled)],
        ["all steps with 12 of 28 reused, forced, over exact",
         cell(report, "step_cache", _ratio("ratio_to_exact"))],
        ["two pictures at strength 0.5, 1024²", cell(report, "two_pictures", seconds)],
        ["fastest attention, text folded", cell(report, "attention", _attention)],
        ["row kernels", cell(report, "row_kernels", _kernels)],
        ["the blocks' products", cell(report, "products", _products)],
        ["ten requests through the server", cell(report, "server", _server)],
    ]  # fmt: skip
    return heading(report) + markdown_table(["what", "figure"], rows)


def memory(report: Report) -> str:
    """The plan's peaks beside the measured ones."""
    section = {} if report is None else report.get("memory", {})
    is_whole = cell(report, "memory", lambda _: "") == ""
    images = section.get("images", {}) if is_whole else {}
    rows = [
        [
            label.replace("_", " "),
            f"`{each['mode']}`",
            f"{each['planned_bytes'] / 1e9:.1f}",
            f"{each['measured_bytes'] / 1e9:.1f}",
        ]
        for label, each in images.items()
    ]
    head = ["image", "mode", "planned peak, GB", "measured, GB"]
    return heading(report) + markdown_table(head, rows or [["1024, exact", *[NOT_MEASURED] * 3]])


def batches(report: Report) -> str:
    """Images denoised together."""
    rows = [
        ["four 1024² images together, each",
         cell(report, "batch", lambda section: f"{section['per_image_s']:.2f} s")],
        ["the same over one by one", cell(report, "batch", _optional_ratio)],
    ]  # fmt: skip
    return heading(report) + markdown_table(["what", "figure"], rows)


def _optional_ratio(section: Mapping[str, Any]) -> str:
    ratio = section["ratio_to_one_by_one"]
    return NOT_MEASURED if ratio is None else f"{ratio:.2f}"


def compiling(report: Report) -> str:
    """Steps of compiled code and of CUDA graphs over the plain ones."""
    rows = [
        ["a step with `--compile blocks` over the eager one",
         cell(report, "compile", _against_plain)],
        ["compiling the blocks",
         cell(report, "compile", lambda found: f"{found['compile_s']:.0f} s")],
        ["a step as a CUDA graph over the same queued anew",
         cell(report, "graphs", _against_plain)],
    ]  # fmt: skip
    return heading(report) + markdown_table(["what", "figure"], rows)


PLACES: Mapping[tuple[str, str], Callable[[Report], str]] = {
    ("README.md", "gpu-speed"): speed,
    ("docs/performance/index.md", "gpu"): everything,
    ("docs/performance/memory.md", "gpu-memory"): memory,
    ("docs/performance/batches.md", "gpu-batches"): batches,
    ("docs/performance/compile.md", "gpu-compile"): compiling,
}
"""By document and mark: what stands there."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
