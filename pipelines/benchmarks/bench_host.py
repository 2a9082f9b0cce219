"""Processor time that a step of FLUX.1 costs its process, before any GPU has computed anything.

    make bench-host

A network of FLUX.1's depth and tiny rows runs on its kernels' operators, on a CPU, with nothing
behind them: kernels are not launched, products and attention only take memory. What is left is the
Python and torch of a step, which a GPU waits for where it is faster. Triton's own launcher is not
in it: it needs a driver. Each step is measured once more "without launches": operators' functions
that prepare a launch only take memory, too, which leaves the network and its operators' checks.
Prints JSON, also written to bench-results/host.json; a figure is the median over steps, and layers
in bfloat16 and in fp8, and both strengths, alternate. ``seconds of 20 million additions`` says how
fast this core runs Python meanwhile. Steps are those after a request's first, which looks at all
tensors once.
"""

import argparse
import importlib
import math
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from machine import environment, save
from torch import Tensor, nn

import redux_kernels
from redux_kernels import (
    adaln,
    dispatch,
    gate_residual_adaln,
    gelu_into,
    gelu_quantize,
    merge_groups,
    qk_norm_rope,
    quantize_rows,
)
from redux_pipelines.attention.groups import Implementation, grouped
from redux_pipelines.conditioning.tokens import Conditioning, Tokens
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.fp8.linear import Fp8Linear
from redux_pipelines.network.flux import Flux, FluxParams
from redux_pipelines.network.operators import KernelOperators
from redux_pipelines.sampling import Grid, Schedule

PARAMS = FluxParams(hidden_size=64, num_heads=4, axes_dim=(4, 6, 6), context_in_dim=64)
"""FLUX.1's 19 and 38 blocks; rows that cost nothing to speak of."""

GRID, SCHEDULE = Grid(2, 2), Schedule((1.0, 0.5, 0.0))
STRENGTHS = (1.0, 0.5)
"""Of the picture: one group of keys beside the folded text, and two."""


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description="Time the host's side of a step.")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("bench-results/host.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {"environment": environment(threads=1, repeats=options.repeats)}
    report["seconds of 20 million additions"] = round(_additions(20_000_000), 2)
    save(report, options.out)
    figures = measure(options.repeats)
    print(save({**report, "milliseconds of processor time per step": figures}, options.out))


@torch.inference_mode()
def measure(repeats: int) -> dict[str, dict[str, float]]:
    """Median and least milliseconds by what is measured."""
    steps = dict(_steps(PARAMS))
    behind = {"": nothing_behind, ", without launches": no_launches}
    times: dict[str, list[float]] = {name + kind: [] for kind in behind for name in steps}
    for _ in range(3 + repeats):  # the first three warm up
        for kind, stubs in behind.items():
            with stubs():
                for name, step in steps.items():
                    times[name + kind].append(_milliseconds(step))
    return {
        name: {
            "median": round(statistics.median(taken[3:]), 2),
            "least": round(min(taken[3:]), 2),
        }
        for name, taken in times.items()
    }


def _additions(count: int) -> float:
    started = time.process_time()
    total = 0
    for each in range(count):
        total += each
    return time.process_time() - started


def _milliseconds(step: Callable[[], object]) -> float:
    started = time.process_time()
    step()
    return 1000 * (time.process_time() - started)


def _steps(params: FluxParams) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for layers in ("bfloat16", "fp8"):
        torch.manual_seed(0)
        flux = Flux(params).to(torch.bfloat16).eval().requires_grad_(False)
        if layers == "fp8":
            _quantize(flux)
        stub = Implementation("stub", grouped(_attention), ("cpu",), (torch.bfloat16,))
        denoiser = EngineDenoiser(flux, stub, KernelOperators())
        img = torch.zeros(1, GRID.tokens, params.in_channels, dtype=torch.bfloat16)
        for strength in STRENGTHS:
            text = Tokens(torch.zeros(1, params.context_in_dim), copies=512)
            picture = Tokens(torch.zeros(3, params.context_in_dim), log_weight=math.log(strength))
            given = Conditioning(text, (picture,), torch.zeros(params.vec_in_dim), guidance=3.5)
            prepared = denoiser.prepare(given, SCHEDULE, GRID)
            yield (
                f"{layers}, strength {strength:g}",
                lambda prepared=prepared, img=img: prepared.predict(img, 1),  # type: ignore[misc]
            )


def _quantize(flux: Flux) -> None:
    """Every linear layer of the blocks in fp8."""
    for name, layer in list(flux.named_modules()):
        if isinstance(layer, nn.Linear) and "_blocks." in name:
            flux.set_submodule(name, Fp8Linear.of(layer.weight, layer.bias))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the memory that an attention's output and log-sum-exp take."""
    return torch.empty_like(q), q.new_empty((*q.shape[:-1], 1), dtype=torch.float32)


@contextmanager
def nothing_behind() -> Iterator[None]:
    """Within, operators believe in kernels that do nothing; products only take memory."""
    with ExitStack() as stack:
        for target, name, stub in (
            (dispatch, "runs_kernel", lambda operator, x: True),
            (F, "linear", _product),
            (torch, "_scaled_mm", _scaled_product),
            *((*kernel, _NoKernel()) for kernel in _kernels()),
        ):
            stack.enter_context(mock.patch.object(target, name, stub))
        yield


@contextmanager
def no_launches() -> Iterator[None]:
    """``nothing_behind`` where operators only take memory instead of preparing a launch."""
    with nothing_behind(), ExitStack() as stack:
        for module, stub in _LAUNCHES.items():
            stack.enter_context(mock.patch.object(module, "launch", stub))
        yield


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _scaled_product(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, **_: Any) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


class _NoKernel:
    """``kernel[grid](...)`` that launches nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return _nothing


def _nothing(*_arguments: object, **_options: object) -> None:
    return None


def _kernels() -> Iterator[tuple[Any, str]]:
    """Each operator's module, and the name of a kernel in it."""
    for found in pkgutil.iter_modules(redux_kernels.__path__):
        module = importlib.import_module(f"redux_kernels.{found.name}")
        for name in vars(module):
            if name.startswith("_") and name.endswith("_kernel"):
                yield module, name


def _launch_adaln(
    x: Tensor, _scale: Tensor, _shift: Tensor, _eps: float, q: Tensor | None = None, *_: Tensor
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if q is None else q


def _launch_gate_residual_adaln(
    x: Tensor, _y: Tensor, _gate: Tensor, _scale: Tensor, _shift: Tensor, _eps: float,
    q: Tensor | None = None, *_: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total) if q is None else q


_LAUNCHES: dict[Any, Callable[..., object]] = {
    adaln: _launch_adaln,
    gate_residual_adaln: _launch_gate_residual_adaln,
    gelu_into: _nothing,
    gelu_quantize: _nothing,
    merge_groups: _nothing,
    qk_norm_rope: _nothing,
    quantize_rows: _nothing,
}
"""What takes the memory that an operator's ``launch`` gives back."""


if __name__ == "__main__":
    main()
