"""One denoising step of the engine against diffusers' transformer, same random weights.

    make bench-engine ARGS="--cases narrow --threads 1"
    make bench-engine ARGS="--compile full --targets"

Prints JSON, also written to bench-results/engine.json, or to bench-results/engine-compiled.json,
after each case.
Runs alternate, so that what else the machine does falls on both; a ratio is the median over pairs
of neighbouring runs. ``wall`` is time passed, ``cpu`` is processor time of this process, which a
busy machine disturbs less. Both backends get the same prepared request; what the engine does once
a request is ``prepare_ms``. With --compile both are compiled: ours once for all sizes, diffusers'
anew for each, as is fastest for it; the first step, which compiles, is ``first_step_s``.
``targets`` says which of our targets hold.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from engine_targets import EAGER, judge, table, target
from machine import environment, save

from redux_pipelines.attention import choice
from redux_pipelines.compilation.compiled import Compiled
from redux_pipelines.conditioning.tokens import Conditioning, Tokens
from redux_pipelines.denoising.denoiser import PreparedDenoiser
from redux_pipelines.denoising.diffusers_backend import DiffusersDenoiser
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.devices import as_current, resolve_device
from redux_pipelines.loading.flux_weights import load_flux
from redux_pipelines.network import operator_choice
from redux_pipelines.network.flux import FluxParams
from redux_pipelines.sampling import Schedule, grid_for

TEXT, PICTURE = 512, 729
STEPS = 28
SCHEDULE = Schedule(tuple(1 - step / STEPS for step in range(STEPS + 1)))
NETWORKS: dict[str, dict[str, Any]] = {
    "wide": {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    "narrow": {
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 64,
        "num_attention_heads": 4,
        "joint_attention_dim": 256,
        "axes_dims_rope": (8, 28, 28),
        "guidance_embeds": True,
    },
}


@dataclass(frozen=True)
class Timing:
    """One call, in milliseconds."""

    wall_ms: float
    cpu_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--sizes", nargs="*", type=int, default=[512, 1024, 1536])
    parser.add_argument("--prompts", nargs="*", default=["empty", "encoded"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--compile",
        default="off",
        choices=["off", "blocks", "full"],
        help="compile both: the kinds of blocks, or the whole step (default: %(default)s)",
    )
    parser.add_argument(
        "--targets",
        action="store_true",
        help="print which targets hold instead of all JSON; 1 is the exit status if one does not",
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    with as_current(device):
        text, judged = _measured(options, device)
    print(table(judged) if options.targets else text)
    sys.exit(options.targets and not all(each["holds"] for each in judged))


def _measured(
    options: argparse.Namespace, device: torch.device
) -> tuple[str, list[dict[str, Any]]]:
    """The report, and which targets hold."""
    name = "engine.json" if options.compile == "off" else "engine-compiled.json"
    out = options.out or Path("bench-results") / name
    given = {key: getattr(options, key) for key in ("threads", "dtype", "repeats", "compile")}
    report: dict[str, Any] = {"environment": environment(str(device), **given)}
    cases: list[dict[str, Any]] = []
    text = save({**report, "cases": cases}, out)
    judged: list[dict[str, Any]] = []
    for case in _cases(options, device):
        cases.append(case)
        judged = judge(cases, device.type)
        text = save({**report, "cases": cases, "targets": judged}, out)
    return text, judged


def _cases(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    for name in options.cases:
        model, engine = _networks(name, device, options.dtype)
        if options.compile != "off":
            _compile(model, engine, options.compile)
        for size in options.sizes:
            for prompt in options.prompts:
                if (name, size, prompt) in EAGER:
                    yield _case(model, engine, (name, size, prompt), options.repeats)


def _networks(name: str, device: torch.device, dtype: str) -> tuple[Any, EngineDenoiser]:
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    model = FluxTransformer2DModel(**NETWORKS[name]).to(device, kind).eval().requires_grad_(False)
    params = FluxParams.of(model.config)
    flux = load_flux(params, model.state_dict(), device=device, dtype=kind)
    attend = choice.choose(device, kind, params.head_dim).attention
    glue = operator_choice.choose(
        device, kind, num_heads=params.num_heads, head_dim=params.head_dim
    )
    return model, EngineDenoiser(flux, attend, glue.operators)


def _compile(model: Any, engine: EngineDenoiser, mode: Any) -> None:
    """Diffusers' in the way its documentation gives for ``mode``, and ours."""
    if mode == "full":
        model.compile(fullgraph=True, dynamic=False)
    else:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    engine.compiled = Compiled(engine.flux, mode)


@torch.inference_mode()
def _case(
    model: Any, engine: EngineDenoiser, case: tuple[str, int, str], repeats: int
) -> dict[str, Any]:
    name, size, prompt = case
    grid = grid_for(size, size, 16)
    given = _conditioning(model, prompt)
    img = torch.randn(1, grid.tokens, model.config.in_channels).to(model.device, model.dtype)
    theirs = DiffusersDenoiser(model).prepare(given, SCHEDULE, grid)
    first, again = (
        _timed(lambda: engine.prepare(given, SCHEDULE, grid), model.device) for _ in range(2)
    )
    ours = engine.prepare(given, SCHEDULE, grid)
    their_step, their_first_s = _first_step(theirs, img)
    own_img = img.clone()  # marked as of any size, which diffusers' is not to be
    our_step, our_first_s = _first_step(ours, own_img)
    if engine.compiled is not None and not engine.compiled.is_active:
        sys.exit(f"ours is not compiled, so nothing was measured: {engine.compiled.failure}")
    pairs = [
        (
            _timed(lambda: theirs.predict(img, 3), model.device),
            _timed(lambda: ours.predict(own_img, 3), model.device),
        )
        for _ in range(repeats)
    ]
    return {
        "network": name,
        "size": size,
        "prompt": prompt,
        "target": target(case, is_compiled=engine.compiled is not None),
        "ratio_wall": _median([ours.wall_ms / theirs.wall_ms for theirs, ours in pairs], 3),
        "ratio_cpu": _median([ours.cpu_ms / theirs.cpu_ms for theirs, ours in pairs], 3),
        "diffusers_ms": _median([theirs.wall_ms for theirs, _ in pairs]),
        "engine_ms": _median([ours.wall_ms for _, ours in pairs]),
        "prepare_ms": {"first": round(first.wall_ms, 1), "again": round(again.wall_ms, 1)},
        "first_step_s": {"diffusers": their_first_s, "engine": our_first_s},
        "largest_difference": float((our_step - their_step).abs().max()),
    }


def _conditioning(model: Any, prompt: str) -> Conditioning:
    config = model.config
    width = config.joint_attention_dim
    if prompt == "empty":
        txt, vec = Tokens(torch.zeros(1, width), TEXT), torch.zeros(config.pooled_projection_dim)
    else:
        txt, vec = Tokens(torch.randn(TEXT, width)), torch.randn(config.pooled_projection_dim)
    return Conditioning(txt, (Tokens(torch.randn(PICTURE, width)),), vec, guidance=3.5)


def _first_step(prepared: PreparedDenoiser, img: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The step that warms up, or compiles, and its seconds."""
    started = time.perf_counter()
    step = prepared.predict(img, 3)
    return step, round(time.perf_counter() - started, 1)


def _timed(call: Callable[[], object], device: torch.device) -> Timing:
    _wait_for(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    _wait_for(device)
    return Timing(1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median(values: list[float], digits: int = 1) -> float:
    return round(statistics.median(values), digits)


if __name__ == "__main__":
    main()
