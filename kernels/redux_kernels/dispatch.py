"""What runs where: an operator's Triton kernel or its reference, and the reason for a refusal.

Fails closed: a kernel runs on a device only after ``self_test`` has seen it agree with its
reference there, and until then, or if it did not, the reference runs. The result is the same up to
rounding either way; ``refusal`` tells what was decided. Nothing is asked of a driver at import.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from redux_kernels.compiler import HAS_TRITON

SM_80 = (8, 0)  # bfloat16 arithmetic
SM_89 = (8, 9)  # conversion to e4m3

REQUIRED_CAPABILITY = {
    "adaln": SM_80,
    "adaln_quantize": SM_89,
    "gate_residual_adaln": SM_80,
    "gate_residual_adaln_quantize": SM_89,
    "qk_norm_rope": SM_80,
    "gelu_into": SM_80,
    "gelu_quantize": SM_89,
    "quantize_rows": SM_89,
    "merge_groups": SM_80,
    "biased_attention": SM_80,
    "group_norm_statistics": SM_80,
    "group_norm_silu": SM_80,
}
"""Each operator's name, and the least compute capability its kernel can be compiled for."""

_AS_IT_IS: AbstractContextManager[object] = nullcontext()

_tested: dict[tuple[str, torch.device], str | None] = {}  # None: passed; else the reason


def hardware_refusal(operator: str, device: torch.device) -> str | None:
    """Why ``device`` cannot run the operator's kernel at all, or None if it can.

    Raises:
        KeyError: no operator has this name.
    """
    needed = REQUIRED_CAPABILITY[operator]
    if device.type != "cuda":
        return f"kernels run on CUDA devices, not on {device.type!r}"
    if getattr(torch.version, "hip", None) is not None:
        return "kernels are written for NVIDIA GPUs, this torch is built for ROCm"
    if not HAS_TRITON:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        what = "e4m3 conversion" if needed == SM_89 else "the kernel"
        name = torch.cuda.get_device_name(device)
        return (
            f"{what} needs compute capability {needed[0]}.{needed[1]}, "
            f"{name} has {found[0]}.{found[1]}"
        )
    return None


def refusal(operator: str, device: torch.device | str) -> str | None:
    """Why the operator's reference runs on ``device``, or None when its kernel does.

    Raises:
        KeyError: no operator has this name.
    """
    device = _indexed(torch.device(device))
    if reason := hardware_refusal(operator, device):
        return reason
    return _tested.get((operator, device), "not self-tested on this device yet")


def record(operator: str, device: torch.device, reason: str | None) -> None:
    """Note a self-test's verdict: None lets the kernel run, a reason keeps the reference."""
    _tested[operator, _indexed(device)] = reason


def runs_kernel(operator: str, x: Tensor) -> bool:
    """Whether the kernel is to run where ``x`` lies: two look-ups, for every call."""
    return x.is_cuda and _tested.get((operator, x.device), "untested") is None


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of ``x`` the current one, on which Triton launches, unless it is already."""
    index = x.get_device()  # -1 on a CPU
    if index < 0 or index == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(index)


def _indexed(device: torch.device) -> torch.device:
    """``cuda`` is a name for the current GPU: say which."""
    if str(device) == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
