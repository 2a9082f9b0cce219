"""Which operators a network runs on: the fastest of those that have proved themselves there.

On a GPU our kernels, if all that are needed agree with their references; on a CPU oneDNN's
products; else plain torch. Decided once, when a model is loaded, and it fails closed. Knows no
blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from redux_kernels import dispatch
from redux_kernels.self_test import self_test
from redux_pipelines import onednn
from redux_pipelines.network.onednn_operators import OneDnnOperators
from redux_pipelines.network.operators import KernelOperators, Operators, TorchOperators

NEEDED = ("adaln", "gate_residual_adaln", "qk_norm_rope", "gelu_into")
"""The kernels that ``KernelOperators`` runs."""

NEEDED_FOR_FP8 = (
    *NEEDED,
    "adaln_quantize",
    "gate_residual_adaln_quantize",
    "gelu_quantize",
    "quantize_rows",
)
"""Those it runs with linears in fp8."""


@dataclass(frozen=True, slots=True)
class OperatorsChoice:
    """What was taken, and for each kernel that is not used the reason."""

    operators: Operators
    refusals: Mapping[str, str]


def choose(
    device: torch.device, dtype: torch.dtype, *, num_heads: int, head_dim: int, fp8: bool = False
) -> OperatorsChoice:
    """Kernels if all that are needed pass their test on ``device``, oneDNN, or plain torch.

    float16 is left to plain torch, which keeps activations in its range.
    """
    needed = NEEDED_FOR_FP8 if fp8 else NEEDED
    if device.type == "cpu":
        return _choose_for_cpu(dtype, needed, width=num_heads * head_dim, fp8=fp8)
    if dtype not in (torch.bfloat16, torch.float32):
        reason = f"kernels take bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
        return OperatorsChoice(TorchOperators(), dict.fromkeys(needed, reason))
    refusals = _refusals({name: dispatch.hardware_refusal(name, device) for name in needed})
    if not refusals:
        verdicts = self_test(device, heads=num_heads, head_dim=head_dim, dtype=dtype)
        refusals = _refusals({name: verdicts[name] for name in needed})
    return OperatorsChoice(TorchOperators() if refusals else KernelOperators(), refusals)


def _choose_for_cpu(
    dtype: torch.dtype, needed: tuple[str, ...], *, width: int, fp8: bool
) -> OperatorsChoice:
    cpu = torch.device("cpu")
    refusals = _refusals({name: dispatch.hardware_refusal(name, cpu) for name in needed})
    if fp8:
        reason: str | None = "does not take fp8"
    elif onednn.loses_to_mkl(width):
        reason = f"is slower than MKL on Intel's processors for rows of {width}"
    else:
        reason = onednn.refusal(cpu, dtype)
    if reason is None:
        return OperatorsChoice(OneDnnOperators(), refusals)
    return OperatorsChoice(TorchOperators(), {**refusals, "onednn": reason})


def _refusals(verdicts: Mapping[str, str | None]) -> dict[str, str]:
    return {name: reason for name, reason in verdicts.items() if reason is not None}
