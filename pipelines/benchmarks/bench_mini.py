"""The embedded model in a process like the server's worker: loading, time per image, memory.

    make bench-mini

Every backend and dtype runs in a process of its own, so that peak memory is its own. Prints JSON,
also written to bench-results/mini.json after each of them. Times are medians; the machine should
be idle.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from machine import environment, save
from PIL import Image

SIZES = ((512, 512), (1024, 1024), (1536, 1024))
TARGETS = {"load_s": 3.0, "1024x1024_s": 6.0, "peak_rss_mb": 1500}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=["diffusers", "engine"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-results/mini.json"))
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.device, options.runs)))
        return
    report: dict[str, Any] = {
        "environment": environment(options.device, runs=options.runs),
        "targets": TARGETS,
        "runs": {},
    }
    text = save(report, options.out)
    for backend in options.backends:
        for dtype in options.dtypes:
            report["runs"][f"{backend} {dtype}"] = _in_a_process(backend, dtype, options)
            text = save(report, options.out)
    print(text)


def _in_a_process(backend: str, dtype: str, options: argparse.Namespace) -> Any:
    command = [sys.executable, __file__, "--one", backend, dtype]
    command += ["--device", options.device, "--runs", str(options.runs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(backend: str, dtype: str, device: str, runs: int) -> dict[str, Any]:
    """Load and generate here, in this process."""
    began = time.perf_counter()
    import_module("redux_pipelines.loading.components")
    from redux_pipelines.contract.types import GenerationRequest
    from redux_pipelines.loading.load import load_pipeline
    from redux_pipelines.memory.malloc import keep_freed_memory

    imported = time.perf_counter()
    pipeline = load_pipeline(model="mini", backend=backend, dtype=dtype, device=device)
    if pipeline.info.device == "cpu":
        keep_freed_memory()
    loaded = time.perf_counter()
    report: dict[str, Any] = {"import_s": imported - began, "load_s": loaded - imported}
    picture = Image.radial_gradient("L").convert("RGB")
    for width, height in SIZES:
        times = []
        for run in range(runs + 1):  # the first warms up
            started = time.perf_counter()
            *_, result = pipeline.generate(
                GenerationRequest(picture, width=width, height=height, seed=run)
            )
            times.append(time.perf_counter() - started)
        stages = getattr(result, "timings", {})
        report[f"{width}x{height}_s"] = statistics.median(times[1:])
        report[f"{width}x{height}_stages"] = {name: round(s, 3) for name, s in stages.items()}
    report["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {key: round(v, 3) if isinstance(v, float) else v for key, v in report.items()}


if __name__ == "__main__":
    main()
