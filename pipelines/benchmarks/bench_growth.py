"""How time and memory of the whole pipeline grow with pixels, steps and images, as a plot.

    make bench-growth ARGS="--model mini"

Runs both backends in turns and writes bench-results/growth.json, after each point, and growth.png.
Time is the median of the runs of a point; memory is the peak above what the loaded model takes: of
the process (VmHWM, reset before each run) on a CPU, of torch's allocator on a GPU.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from machine import environment, save
from PIL import Image

from redux_pipelines.contract.types import GenerationRequest, Pipeline
from redux_pipelines.loading.load import load_pipeline

BACKENDS = ("engine", "diffusers")
AXES: dict[str, list[dict[str, int]]] = {
    "pixels": [{"width": side, "height": side} for side in (512, 768, 1024, 1280, 1536)],
    "num_inference_steps": [{"num_inference_steps": steps} for steps in (4, 14, 28, 50)],
    "num_images": [{"num_images": count} for count in (1, 2, 3, 4)],
}
LABELS = {"pixels": "megapixels", "num_inference_steps": "steps", "num_images": "images"}


@dataclass(frozen=True)
class Point:
    """One request on one backend."""

    backend: str
    axis: str
    x: float
    seconds: float
    peak_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--out", type=Path, default=Path("bench-results"), help="a folder (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipelines = {
        name: load_pipeline(model=options.model, backend=name, device=options.device)
        for name in BACKENDS
    }
    details = {"threads": options.threads, "model": options.model, "repeats": options.repeats}
    device = pipelines[BACKENDS[0]].info.device
    points: list[Point] = []
    report: dict[str, Any] = {"environment": environment(device, **details), "points": []}
    text = save(report, options.out / "growth.json")
    for axis in AXES:
        for point in _measure(pipelines, axis, options.repeats):
            points.append(point)
            report["points"].append(asdict(point))
            text = save(report, options.out / "growth.json")
    draw(points, options.out / "growth.png")
    print(text)


def _measure(pipelines: dict[str, Pipeline], axis: str, repeats: int) -> Iterator[Point]:
    for fields in AXES[axis]:
        request = GenerationRequest(Image.new("RGB", (256, 256), "orange"), **_whole(fields))
        runs = [
            (name, _run(pipeline, request))
            for _ in range(repeats)
            for name, pipeline in pipelines.items()
        ]
        for name in pipelines:
            own = [run for backend, run in runs if backend == name]
            seconds, peaks = zip(*own, strict=True)
            x = request.width * request.height / 1e6 if axis == "pixels" else fields[axis]
            yield Point(name, axis, x, statistics.median(seconds), max(peaks))


def _whole(fields: dict[str, int]) -> dict[str, Any]:
    """The point's fields, and 512 × 512 where size is not what grows."""
    return {"width": 512, "height": 512, **fields}


def _run(pipeline: Pipeline, request: GenerationRequest) -> tuple[float, float]:
    device = torch.device(pipeline.info.device)
    before, started = _reset_peak(device), time.perf_counter()
    for _ in pipeline.generate(request):
        pass
    return time.perf_counter() - started, _peak_mb(device) - before


def _reset_peak(device: torch.device) -> float:
    """Forget the peak so far; returns what is taken now, in MB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # else pages of earlier runs hide what this one needs
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mb("VmRSS")


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return _status_mb("VmHWM")


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1000


def draw(points: list[Point], out: Path) -> None:
    """Write a PNG: a column per axis, time above memory."""
    mpl.use("agg")
    figure, rows = plt.subplots(2, len(AXES), figsize=(10, 5.4), layout="constrained")
    for axes, field, label in zip(rows, ("seconds", "peak_mb"), ("s", "MB"), strict=True):
        for panel, axis in zip(axes, AXES, strict=True):
            for backend in BACKENDS:
                own = [point for point in points if (point.backend, point.axis) == (backend, axis)]
                xs = [point.x for point in own]
                panel.plot(xs, [getattr(point, field) for point in own], "o-", label=backend)
            panel.set_xlabel(LABELS[axis])
            panel.set_ylabel(label)
            panel.set_ylim(0, 1.1 * panel.dataLim.ymax)
            panel.grid(alpha=0.3)
    rows[0][0].legend(frameon=False)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
