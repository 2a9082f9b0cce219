"""Measures what the tiers and fp8 cost, on icons that the embedded model never saw.

    make eval-approximations

Writes a report and the tables of docs/performance/index.md. Everything is compared with the same
seed computed exactly in float32 (one row, in bfloat16), and runs in turns with it; on a CPU, in one
thread. Knows the order of measurements and where files lie.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from redux_pipelines.compilation.cache import machine_facts
from redux_pipelines.contract.types import GenerationRequest, Pipeline, Result
from redux_pipelines.fp8.linear import Fp8Linear
from redux_pipelines.loading.load import load_pipeline
from training import metrics
from training.documents import has_place, markdown_table, place_figures
from training.icons import COUNT, held_out
from training.reports import environment, write_json

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "performance" / "index.md"

TIERS = ("balanced", "fast")
SIDES = {512: 16, 1024: 5}
"""Sides of the tiers' pictures, and how many icons are varied at each."""

FP8_ICONS = 8
AGAINST_BFLOAT16 = "against the same without fp8"
KINDS = ("proj", "mlp_out", "linear2", "linear1")

Keeps = Callable[[str], bool]
"""Whether a layer, by its name in our network, is left in the model's dtype."""


@dataclass(frozen=True)
class Cost:
    """What an approximation costs: means over pictures, and the worst of them.

    PSNR in dB; ``reused`` of a picture's steps; ``time`` is the median ratio of processor times,
    and ``share`` that of the blocks' weights in fp8.
    """

    icons: int
    psnr: float
    least_psnr: float
    ssim: float
    least_ssim: float
    reused: float = 0.0
    time: float | None = None
    share: float | None = None


def icons_for(count: int) -> list[Image.Image]:
    """So many, evenly spread."""
    return held_out(index * COUNT // count for index in range(count))


def measure_tiers(
    pipeline: Pipeline, sides: dict[int, int], steps: int
) -> Iterator[tuple[str, Cost]]:
    """Each tier at each side, by a label."""
    for side, count in sides.items():
        icons = icons_for(count)
        for tier in TIERS:
            options: dict[str, Any] = {"width": side, "height": side, "num_inference_steps": steps}
            pairs = [
                [_timed(pipeline, icon, quality=quality, **options) for quality in ("exact", tier)]
                for icon in icons
            ]
            yield f"{tier}, {side}²", _cost(pairs)


def measure_fp8(steps: int, count: int) -> Iterator[tuple[str, Cost]]:
    """fp8 in all layers, in all but a kind or place, and bfloat16 beside it, at 512 × 512."""
    exact = load_pipeline(model="mini", device="cpu", dtype="float32")
    rounded = load_pipeline(model="mini", device="cpu", dtype="bfloat16")
    for label, dtype, keeps in _variants(_flux(exact)):
        transformer_dtype = "auto" if keeps is None else "fp8"
        other = load_pipeline(
            model="mini", device="cpu", dtype=dtype, transformer_dtype=transformer_dtype
        )
        share = 0.0 if keeps is None else _keep(other, exact, keeps)
        against = rounded if label.endswith(AGAINST_BFLOAT16) else exact
        options: dict[str, Any] = {"width": 512, "height": 512, "num_inference_steps": steps}
        pairs = [
            [_timed(each, icon, **options) for each in (against, other)]
            for icon in icons_for(count)
        ]
        cost = _cost(pairs)
        yield label, Cost(**{**asdict(cost), "time": None, "share": share})


def _variants(flux: nn.Module) -> Iterator[tuple[str, str, Keeps | None]]:
    """Labels, the model's dtype, and what stays out of fp8; None is all of it."""
    ends = ("double_blocks.0.", f"single_blocks.{len(flux.single_blocks) - 1}.")  # type: ignore[arg-type]
    yield "all", "float32", lambda name: False
    for kind in KINDS:
        yield f"all but `{kind}`", "float32", _ends_with(f".{kind}")
    yield "all but `mlp_out` and `linear2`", "float32", _ends_with(".mlp_out", ".linear2")
    yield "all but the first and the last block", "float32", lambda name: name.startswith(ends)
    yield "none, the model in bfloat16", "bfloat16", None
    for what in ("(as on a GPU)", AGAINST_BFLOAT16):
        yield f"all, the model in bfloat16 {what}", "bfloat16", lambda name: False


def _ends_with(*ends: str) -> Keeps:
    return lambda name: name.endswith(ends)


def _flux(pipeline: Any) -> nn.Module:
    flux: nn.Module = pipeline._components.denoiser.flux
    return flux


def _keep(pipeline: Pipeline, exact: Pipeline, keeps: Keeps) -> float:
    """Put layers of ``exact`` back that are kept; the share of weights that is in fp8 then."""
    flux, original = _flux(pipeline), _flux(exact)
    in_fp8 = total = 0
    for name, layer in list(flux.named_modules()):
        if not isinstance(layer, Fp8Linear):
            continue
        total += layer.weight.numel()
        if keeps(name):
            flux.set_submodule(name, original.get_submodule(name))
        else:
            in_fp8 += layer.weight.numel()
    return in_fp8 / total


@dataclass(frozen=True)
class _Made:
    image: Image.Image
    seconds: float
    reused: int


def _timed(pipeline: Pipeline, icon: Image.Image, **options: Any) -> _Made:
    started = time.process_time()
    *_, last = pipeline.generate(GenerationRequest(icon, seed=0, **options))
    if not isinstance(last, Result):
        raise RuntimeError("the pipeline ended without a result")
    return _Made(last.images[0], time.process_time() - started, last.reused_steps)


def _cost(pairs: Sequence[Sequence[_Made]]) -> Cost:
    tensors = [tuple(metrics.to_tensor([made.image]) for made in pair) for pair in pairs]
    psnr = [metrics.psnr(one, two) for one, two in tensors]
    ssim = [metrics.ssim(one, two) for one, two in tensors]
    return Cost(
        icons=len(pairs),
        psnr=statistics.mean(psnr),
        least_psnr=min(psnr),
        ssim=statistics.mean(ssim),
        least_ssim=min(ssim),
        reused=statistics.mean(other.reused for _, other in pairs),
        time=statistics.median(other.seconds / exact.seconds for exact, other in pairs),
    )


def tier_table(costs: dict[str, Cost]) -> str:
    """Markdown."""
    head = ["tier, size (icons)", "PSNR mean (least), dB", "SSIM least", "steps reused"]
    rows = [
        [
            f"{label} ({cost.icons})",
            f"{cost.psnr:.1f} ({cost.least_psnr:.1f})",
            _unit(cost.least_ssim),
            f"{cost.reused:.1f}",
            f"{cost.time:.2f}",
        ]
        for label, cost in costs.items()
    ]
    return markdown_table([*head, "processor time, median ratio"], rows)


def fp8_table(costs: dict[str, Cost]) -> str:
    """Markdown."""
    rows = [
        [
            label,
            f"{cost.share:.2f}",
            f"{cost.psnr:.1f} ({cost.least_psnr:.1f})",
            _unit(cost.ssim),
        ]
        for label, cost in costs.items()
    ]
    head = ["in fp8", "share of the blocks' weights", "PSNR mean (least), dB", "SSIM mean"]
    return markdown_table(head, rows)


def _unit(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


TABLES = {"tiers": tier_table, "fp8": fp8_table}
"""By the marks of their places in the document."""


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="Measure what tiers and fp8 cost.")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-results" / "approximations.json")
    parser.add_argument("--document", type=Path, help="where tables between marks are replaced")
    options = parser.parse_args()
    for name in TABLES if options.document else ():
        if not has_place(options.document, name):
            parser.error(f"{options.document} has no place for figures: {name}")
    torch.set_num_threads(1)
    exact = load_pipeline(model="mini", device="cpu", dtype="float32")
    costs = {
        "tiers": dict(measure_tiers(exact, SIDES, options.steps)),
        "fp8": dict(measure_fp8(options.steps, FP8_ICONS)),
    }
    processor = machine_facts(torch.device("cpu"))["processor"]
    report: dict[str, Any] = {
        "environment": {**environment(), "processor": processor, "threads": 1},
        "steps": options.steps,
    }
    for name, of_name in costs.items():
        report[name] = {label: asdict(cost) for label, cost in of_name.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, options.out)
    for name, table in TABLES.items() if options.document else ():
        place_figures(options.document, name, table(costs[name]))


if __name__ == "__main__":
    main()
