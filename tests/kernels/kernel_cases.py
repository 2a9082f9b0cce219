"""What the kernels' tests share: where they run, tensors amid canaries, tolerances."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from redux_kernels.checks import Quantized, empty_quantized
from redux_kernels.registration import overload_of

KERNEL_DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
"""``launch`` runs the kernel on both: an interpreter takes CPU tensors."""

TOLERANCES = [
    pytest.param(torch.bfloat16, 1e-5, 2**-8, id="bfloat16"),
    pytest.param(torch.float16, 1e-5, 2**-10, id="float16"),
    pytest.param(torch.float32, 2e-6, 1e-5, id="float32"),
]
"""(dtype, atol, rtol) against the float32 result: one unit in the last place."""

NAN = float("nan")


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Plain attention ``(B, heads, S, d)`` with a bias per key, and its log-sum-exp."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    return logits.softmax(dim=-1) @ v, logits.logsumexp(dim=-1)


def amid_canaries(*shape: int, dtype: torch.dtype, device: str = "cpu", gap: int = 16) -> Tensor:
    """Normal numbers in a view of a buffer whose every other element is NaN.

    Rows (the last axis but one) lie ``gap`` elements apart, and there are NaN rows before and
    after each block of rows: an element read or written outside the view shows.
    """
    *outer, rows, width = shape
    buffer = torch.full((*outer, rows + 2, width + 2 * gap), NAN, dtype=dtype, device=device)
    view = buffer[..., 1 : rows + 1, gap : gap + width]
    view.copy_(torch.randn(*shape, device=device))
    return view


def canaries_of(view: Tensor) -> Tensor:
    """All elements of the buffer behind a view that are not in the view."""
    base = view._base
    assert base is not None
    inside = torch.zeros(base.shape, dtype=torch.bool, device=base.device)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return base[~inside]


def modulation(batch: int, width: int, count: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """``count`` vectors (batch, width), side by side in one table as a modulation linear's are."""
    table = torch.randn(batch, count * width, device=device).to(dtype) * 0.5
    return list(table.chunk(count, dim=-1))


def quantized_by(write: Callable[..., object], x: Tensor, width: int, *given: object) -> Quantized:
    """What ``write(*given, q, row_scale)`` leaves of ``width`` columns for each row of ``x``."""
    room = empty_quantized(x, width)
    write(*given, *room)
    return room


def check_quantizing(operator: Callable[..., object], *given: object) -> None:
    """``torch.library.opcheck``; its ``test_schema`` compares no e4m3, what it asks is asked here.

    ``given`` ends with the room that is written to. Nothing else is.
    """
    overload = overload_of(operator)
    written = [each.name for each in overload._schema.arguments if each.alias_info is not None]
    assert written == ["q", "row_scale"]
    tensors = [each for each in given if isinstance(each, Tensor)]
    before = [each.clone() for each in tensors[:-2]]
    with torch.inference_mode():
        tensors[-1].fill_(NAN)
    overload(*given)
    assert tensors[-1].isfinite().all()
    assert all(map(torch.equal, before, tensors[:-2]))
    asked = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(overload, given, test_utils=asked)


def assert_quantized(q: Tensor, row_scale: Tensor, h: Tensor) -> None:
    """``q * row_scale`` is ``h`` (float32) to within half a step of e4m3, and uses its range."""
    h = h.flatten(0, 1)
    assert q.dtype == torch.float8_e4m3fn
    assert row_scale.dtype == torch.float32
    amax = h.abs().amax(dim=-1, keepdim=True)
    torch.testing.assert_close(row_scale, amax.clamp_min(1e-12) / 448, rtol=1e-5, atol=0)
    error = (q.float() * row_scale - h).abs()
    half_step = h.abs() * 2**-4 + row_scale * 2**-10
    assert (error <= half_step * 1.001).all()
    largest = q.float().abs().amax(dim=-1, keepdim=True)
    assert torch.equal(largest[amax > 1e-9], torch.full_like(largest, 448.0)[amax > 1e-9])
