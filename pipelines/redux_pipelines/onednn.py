"""Linear layers through oneDNN, which torch's own ``linear`` leaves to MKL in float32.

oneDNN writes its code for the processor it finds; MKL takes its AVX-512 code on Intel's processors
only, and is half as fast on AMD's (docs/performance/index.md). It also adds a bias, GELU or another
tensor before a result is written. torch offers it to its own compiler as operators; here they are
called on weights as they are, and stand behind operators of ours where torch.compile is at work.
Knows no network.
"""

import contextlib
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS_AT_ONCE = 1024
"""Rows of an MLP per thread: what lies between its two layers is to stay in the caches."""

_MKL_WINS_FROM = 1024
"""Width of rows from which on MKL's AVX-512 code is faster than oneDNN on weights as they are."""

_TOLERANCE = 1e-5
_CPU_INFO = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of ``x (…, in)`` in float32; ``weight (out, in)``, contiguous."""
    if torch.compiler.is_compiling():
        out: Tensor = _linear_operator(x, weight, bias)
        return out
    return product(x, weight, bias)


def add_linear(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """``other + x · weightᵀ``, ``other (…, out)``, in one pass over the result.

    ``weight (out, in)`` may be some columns of a wider one.
    """
    if torch.compiler.is_compiling():
        out: Tensor = _add_linear_operator(x, weight, other)
        return out
    return add_product(x, weight, other)


def mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """``down`` of GELU (tanh) of ``up`` of ``x (…, in)``, by some rows at a time.

    ``up (4 H, in)`` and ``down (H, 4 H)``, with their biases; the middle is never there whole.
    ``down`` may be some columns of a wider one: it is copied, which its rows are too many for.
    """
    if torch.compiler.is_compiling():
        out: Tensor = _mlp_operator(x, up, up_bias, down, down_bias)
        return out
    return _mlp(x, up, up_bias, down, down_bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, attr: str = "none") -> Tensor:
    """``linear`` where nothing is compiled; ``attr`` is ``gelu`` to end in GELU (tanh).

    ``weight`` is contiguous, or its transpose is: for anything else oneDNN has slow code only.
    """
    algorithm = "tanh" if attr == "gelu" else ""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm)
    return out


def add_product(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """``add_linear`` where nothing is compiled."""
    dense = weight if weight.t().is_contiguous() else weight.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, dense, None, "add")
    return out


def _mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    rows, down = x.reshape(-1, x.shape[-1]), down.contiguous()
    out = x.new_empty(len(rows), len(down))
    at_once = _ROWS_AT_ONCE * torch.get_num_threads()
    for part, target in zip(torch.split(rows, at_once), torch.split(out, at_once), strict=True):
        target.copy_(product(product(part, up, up_bias, "gelu"), down, down_bias))
    return out.view(*x.shape[:-1], -1)


@torch.library.custom_op("redux_pipelines::onednn_linear", mutates_args=())
def _linear_operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


@_linear_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("redux_pipelines::onednn_add_linear", mutates_args=())
def _add_linear_operator(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    return add_product(x, weight, other)


@_add_linear_operator.register_fake
def _(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    return x.new_empty(other.shape)


@torch.library.custom_op("redux_pipelines::onednn_mlp", mutates_args=())
def _mlp_operator(
    x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor
) -> Tensor:
    return _mlp(x, up, up_bias, down, down_bias)


@_mlp_operator.register_fake
def _(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], down.shape[0]))


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these are not to be used there, or None: they exist there and agree with plain torch.

    Whatever goes wrong is a reason.
    """
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    if dtype != torch.float32:  # the others torch gives to oneDNN itself
        return f"does not take {str(dtype).removeprefix('torch.')}"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"is measured on x86-64 only, not on {platform.machine()}"
    try:
        error = self_test()
    except Exception as failure:
        return f"failed: {str(failure).partition(chr(10))[0] or type(failure).__name__}"
    if not error <= _TOLERANCE:  # NaN is not
        return f"is wrong: relative error {error:.1e}, at most {_TOLERANCE:.0e} allowed"
    return None


def loses_to_mkl(width: int) -> bool:
    """Whether torch's own linears are faster for rows this wide: on Intel's processors they may be.

    False where the processor does not say whose it is.
    """
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return width >= _MKL_WINS_FROM and has_mkl and _is_intels()


def _is_intels() -> bool:
    with contextlib.suppress(OSError):
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
        return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in lines)
    return "GenuineIntel" in platform.processor()  # Windows, where MKL is the same


@torch.inference_mode()
def self_test() -> float:
    """The largest relative error against float64 of each of them; NaN if there is one.

    Weights lie apart as in the network: some columns of wider rows, transposed ones.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, up, down = draw(2, 70, 48), draw(96, 48), draw(80, 128)[:, 32:]
    up_bias, down_bias, other = draw(96), draw(80), draw(2, 70, 80)
    middle = F.gelu(F.linear(x.double(), up.double(), up_bias.double()), approximate="tanh")
    values = draw(96, 80).t()
    pairs = [
        (linear(x, up, up_bias), F.linear(x.double(), up.double(), up_bias.double())),
        (linear(x, up), F.linear(x.double(), up.double())),
        (
            mlp(x, up, up_bias, down, down_bias),
            F.linear(middle, down.double(), down_bias.double()),
        ),
        (
            add_linear(middle.float(), values, other),
            F.linear(middle, values.double()) + other.double(),
        ),
    ]
    errors = torch.stack([(got - wanted).norm() / wanted.norm() for got, wanted in pairs])
    return float(errors.max())
