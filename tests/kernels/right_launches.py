"""What each kernel's ``launch`` computes, by its reference: for tests where no kernel can run."""

from typing import Any, NamedTuple

from torch import Tensor

from redux_kernels import (
    adaln,
    attention,
    checks,
    gate_residual_adaln,
    gelu_into,
    gelu_quantize,
    group_norm_silu,
    merge_groups,
    qk_norm_rope,
    quantize_rows,
    reference,
)
from stand_ins import Computation


class Kernel(NamedTuple):
    """Where a launch is, and what it should compute."""

    module: Any
    launch: Computation
    name: str = "launch"


def _adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float, *room: Tensor) -> Tensor:
    if not room:
        return reference.adaln(x, scale, shift, eps)
    checks.write_quantized(reference.adaln_quantize(x, scale, shift, eps), *room)
    return room[0]


def _gate_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, *room: Tensor
) -> tuple[Tensor, Tensor]:
    if not room:
        return reference.gate_residual_adaln(x, y, gate, scale, shift, eps)
    total, *made = reference.gate_residual_adaln_quantize(x, y, gate, scale, shift, eps)
    checks.write_quantized(tuple(made), *room)
    return total, room[0]


def _gelu_quantize(mlp: Tensor, beside: Tensor | None, *room: Tensor) -> None:
    checks.write_quantized(reference.gelu_quantize(mlp, beside), *room)


def _quantize_rows(x: Tensor, *room: Tensor) -> None:
    checks.write_quantized(reference.quantize_rows(x), *room)


def _biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor) -> None:
    out.copy_(reference.biased_attention(q, k, v, bias))


_ROOM = ("q", "row_scale")
_NORM = ("x", "scale", "shift", "eps")
_GATED = ("x", "y", "gate", "scale", "shift", "eps")
_ROPE = ("qkv", "q_weight", "k_weight", "cos", "sin", "q", "k", "v", "row_offset", "eps")
_MERGED = ("outs", "lses", "biases", "q", "keys", "values", "key_biases", "into", "joint_lse")
_GROUPED = ("x", "mean", "var", "weight", "bias", "eps")

KERNELS = {
    "adaln": Kernel(adaln, Computation(_adaln, _NORM)),
    "adaln_quantize": Kernel(adaln, Computation(_adaln, (*_NORM, *_ROOM), _ROOM)),
    "gate_residual_adaln": Kernel(gate_residual_adaln, Computation(_gate_residual_adaln, _GATED)),
    "gate_residual_adaln_quantize": Kernel(
        gate_residual_adaln, Computation(_gate_residual_adaln, (*_GATED, *_ROOM), _ROOM)
    ),
    "qk_norm_rope": Kernel(
        qk_norm_rope, Computation(reference.qk_norm_rope, _ROPE, ("q", "k", "v"))
    ),
    "gelu_into": Kernel(
        gelu_into, Computation(reference.gelu_into, ("mlp", "out", "column"), ("out",))
    ),
    "gelu_quantize": Kernel(
        gelu_quantize, Computation(_gelu_quantize, ("mlp", "beside", *_ROOM), _ROOM)
    ),
    "quantize_rows": Kernel(quantize_rows, Computation(_quantize_rows, ("x", *_ROOM), _ROOM)),
    "merge_groups": Kernel(
        merge_groups, Computation(reference.merge_groups, _MERGED, ("into", "joint_lse"))
    ),
    "biased_attention": Kernel(
        attention, Computation(_biased_attention, ("q", "k", "v", "bias", "out"), ("out",))
    ),
    "group_norm_statistics": Kernel(
        group_norm_silu,
        Computation(reference.group_norm_statistics, ("x", "groups")),
        "launch_statistics",
    ),
    "group_norm_silu": Kernel(group_norm_silu, Computation(reference.group_norm_silu, _GROUPED)),
}
