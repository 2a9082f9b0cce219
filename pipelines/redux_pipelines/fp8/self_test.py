"""Whether a device multiplies in fp8, and does so rightly: asked at start-up, before weights load.

Fails closed: hardware that has no e4m3, a product that raises, and one whose numbers are off are
each a reason for not using it. Products of each depth that the blocks have are tried twice, with
other rows and weights: what does nothing, or gives again what it gave before, is off. Knows no
model but its width.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from redux_kernels.dispatch import SM_89
from redux_kernels.reference import quantize_rows
from redux_pipelines.fp8.linear import ALL, E4M3, Fp8Linear

FLUX_WIDTH = 3072

MAX_ERROR = 2e-2
"""Allowed of a product, against the same e4m3 numbers multiplied in float32. Rounding to bfloat16
costs .0017; sums of 4096 products in tensor cores that keep 14 bits cost up to .02 on single
numbers, says the DeepSeek-V3 report (arXiv 2412.19437, 3.3.2). Longer sums are cut off more often
and may be off by more, by the root of their length. A wrong scale or layout costs far more."""

_DEPTH_OF_MAX_ERROR = 4096

MAX_LOSS = 5e-2
"""Allowed of quantisation and product together, against a matmul of what was quantised. The test's
numbers lose .026, measured on a CPU at widths of 256 and 3072."""

DEPTHS = (1, 4, 5)
"""In widths, how many numbers the products of FLUX's blocks add up: what follows a norm or
attention, a double block's second MLP layer, a single block's ``linear2``."""

_CPU_WIDTH = 256  # a CPU would need seconds for more
_ROWS = (1, 67, 320)  # one folded text token; a tail in every tile; several tiles
_REASON_LENGTH = 300


def refusal(device: torch.device, dtype: torch.dtype, width: int = FLUX_WIDTH) -> str | None:
    """Why transformers of this ``width`` and ``dtype`` must not run in fp8 there; None: they may.

    Runs the self-test. A CPU is allowed to: it is slow there, and good for measuring.
    """
    tested = min(width, _CPU_WIDTH) if device.type == "cpu" else width
    return (
        hardware_refusal(device)
        or _kind_refusal(device, dtype, width)
        or _run(device, dtype, tested)
    )


def hardware_refusal(device: torch.device) -> str | None:
    """Why ``device`` has no e4m3 arithmetic for us, or None."""
    if device.type == "cpu":
        return _cpu_refusal()
    if device.type != "cuda":
        return f"fp8 runs on CUDA devices and CPUs, not on {device.type!r}"
    if getattr(torch.version, "hip", None) is not None:
        return "fp8 is written for NVIDIA GPUs, this torch is built for ROCm"
    found = torch.cuda.get_device_capability(device)
    if found < SM_89:
        return (
            f"fp8 needs compute capability 8.9 (Ada, Hopper or newer), "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
        )
    return None


@cache
def _cpu_refusal() -> str | None:
    """On a CPU torch 2.11 multiplies whole matrices with one scale each, not rows with theirs."""
    rows, scales = torch.ones(16, 16).to(E4M3), torch.ones(16, 1)
    try:
        torch._scaled_mm(
            rows, rows.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16
        )
    except RuntimeError:
        return (
            "on a CPU fp8 needs products whose rows have scales of their own, which torch "
            f"{torch.__version__} lacks there: use torch 2.13 or newer"
        )
    return None


def _kind_refusal(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    if device.type == "cpu":
        return None
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        return f"on a GPU fp8 products come out in bfloat16, and the dtype asked for is {name}"
    if width % 16:
        return f"on a GPU fp8 needs widths that are multiples of 16, and the model's is {width}"
    return None


class _Case(NamedTuple):
    layer: Fp8Linear
    weight: Tensor
    bias: Tensor
    x: Tensor
    parts: tuple[slice, ...]


@torch.inference_mode()
def _run(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The self-test. Whatever goes wrong is a reason."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    try:
        for case in _cases(draw, width):
            for part in case.parts:
                if reason := _compare(case, part):
                    return f"the self-test of fp8 failed: {reason}"
    except Exception as error:
        return f"the self-test of fp8 failed: {type(error).__name__}: {error}"[:_REASON_LENGTH]
    return None


def _cases(draw: Callable[..., Tensor], width: int) -> Iterator[_Case]:
    """Every shape twice; of the first layer a part alone, too, as a single block wants it."""
    for _ in range(2):
        for depth in DEPTHS:
            out = 3 * width if depth == 1 else width
            weight, bias = draw(out, depth * width) / (depth * width) ** 0.5, draw(out)
            layer = Fp8Linear.of(weight, bias)
            parts = (ALL, slice(width, 2 * width)) if depth == 1 else (ALL,)
            yield from (_Case(layer, weight, bias, draw(1, n, depth * width), parts) for n in _ROWS)


def max_error(depth: int) -> float:
    """``MAX_ERROR`` of sums of ``depth`` products."""
    return MAX_ERROR * math.sqrt(max(1.0, depth / _DEPTH_OF_MAX_ERROR))


def _compare(case: _Case, part: slice) -> str | None:
    """``part`` of the output's columns, against two products in float32."""
    layer, depth = case.layer, case.x.shape[-1]
    got = layer(case.x, part)
    q, row_scale = quantize_rows(case.x)
    weight = layer.weight[part].float() * layer.weight_scale[part]
    same = F.linear(q.float() * row_scale, weight, layer.bias[part].float())
    unquantized = F.linear(case.x, case.weight[part], case.bias[part]).float()
    kind = str(case.x.dtype).removeprefix("torch.")
    if got.shape != same.shape or got.dtype != case.x.dtype:
        return f"gives {tuple(got.shape)} {got.dtype}, not {tuple(same.shape)} {kind}"
    for want, allowed, against in (
        (same, max_error(depth), "the same numbers in float32"),
        (unquantized, MAX_LOSS, f"a product in {kind}"),
    ):
        error = float((got.float() - want).norm() / want.norm())
        if not error <= allowed:  # NaN is not
            return (
                f"{case.x.shape[1]} rows of {depth} are off by {error:.2g} of {against} "
                f"(allowed: {allowed:.2g})"
            )
    return None
