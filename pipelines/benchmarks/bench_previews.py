"""What a preview costs: on the thread that drives the device, and beside it.

    make bench-previews

For ``mini`` the step is its own; at FLUX.1's sizes only the preview is timed, of random latents. A
worker makes five a second at most, so their share of the device's time is that of five, or of
one a step where steps take longer. Medians; prints JSON, also written to
bench-results/previews.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import environment, save
from PIL import Image

from redux_pipelines.contract.types import GenerationRequest, Preview, Progress
from redux_pipelines.devices import resolve_device
from redux_pipelines.loading.load import load_pipeline
from redux_pipelines.previews import LatentColours
from redux_pipelines.sampling import Grid
from redux_server.worker.previews import EVERY_S, encoded

SIDES = (512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-results/previews.json"))
    options = parser.parse_args()
    device = resolve_device(options.device)
    report: dict[str, Any] = {
        "environment": environment(str(device), runs=options.runs),
        "mini": {f"{side}x{side}": of_mini(str(device), side, options.runs) for side in SIDES},
        "flux_sizes": {f"{side}x{side}": of_flux(device, side) for side in SIDES},
    }
    print(save(report, options.out))


def of_mini(device: str, side: int, runs: int) -> dict[str, float]:
    """A step's time without previews, and what a preview takes of the same thread."""
    pipeline = load_pipeline(model="mini", device=device)
    request = GenerationRequest(Image.new("RGB", (64, 64), "teal"), width=side, height=side)
    steps, previews, encodings = [], [], []
    for _ in range(runs + 1):  # the first warms up
        *_, result = pipeline.generate(request)
        steps.append(result.timings["denoise_s"] / request.num_inference_steps)  # type: ignore[union-attr]
        for event in pipeline.generate(request):
            if isinstance(event, Progress) and event.preview is not None:
                seconds, preview = timed(event.preview)
                previews.append(seconds)
                encodings.append(timed(lambda preview=preview: encoded(preview.image))[0])
    return figures(statistics.median(previews), statistics.median(encodings), steps[1:])


def of_flux(device: torch.device, side: int) -> dict[str, float]:
    """A preview of FLUX.1's latents at this size; without a step to compare it with."""
    grid = Grid(side // 16, side // 16)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    img, velocity = torch.randn(2, 1, grid.tokens, 64, device=device, dtype=dtype)
    sigma = torch.tensor(0.5, device=device)
    colours = LatentColours(torch.randn(16, 3, device=device), torch.zeros(3, device=device))

    def look() -> Preview:
        return Preview(colours.picture(img, velocity, sigma, grid), 0)

    made = [timed(look) for _ in range(60)][10:]
    encodings = [timed(lambda: encoded(made[0][1].image))[0] for _ in range(20)]
    return figures(statistics.median([each[0] for each in made]), statistics.median(encodings))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    started = time.perf_counter()
    value = call()
    return time.perf_counter() - started, value


def figures(
    preview_s: float, encode_s: float, steps_s: list[float] | None = None
) -> dict[str, float]:
    """Milliseconds, and the share of the device's time that previews take at most."""
    found = {"preview_ms": preview_s * 1000, "encode_beside_ms": encode_s * 1000}
    every_s = EVERY_S
    if steps_s:
        step_s = statistics.median(steps_s)
        found["step_ms"] = step_s * 1000
        every_s = max(EVERY_S, step_s)
    found["share_percent"] = 100 * preview_s / every_s
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
