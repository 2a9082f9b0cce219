"""Gated residual and the next norm, against torch in float64 and against the reference."""

import pytest
import torch
from kernel_cases import (
    KERNEL_DEVICES,
    TOLERANCES,
    amid_canaries,
    assert_quantized,
    check_quantizing,
    modulation,
)

from redux_kernels import gate_residual_adaln as op
from redux_kernels import reference
from redux_kernels.adaln import adaln
from redux_kernels.checks import empty_quantized
from redux_kernels.gate_residual_adaln import gate_residual_adaln, gate_residual_adaln_quantize
from redux_kernels.registration import overload_of

SHAPES = [
    pytest.param(1, 3, 3072, id="flux"),
    pytest.param(2, 9, 256, id="mini-with-a-tail-of-rows"),
    pytest.param(2, 5, 100, id="odd-width"),
    pytest.param(1, 0, 256, id="no-rows"),
]


def inputs(batch, rows, width, dtype, device="cpu"):
    x = amid_canaries(batch, rows, width, dtype=dtype, device=device)
    y = amid_canaries(batch, rows, width, dtype=dtype, device=device, gap=32)
    return (x, y, *modulation(batch, width, 3, dtype, device))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize(("batch", "rows", "width"), SHAPES)
def test_kernel_is_its_reference(batch, rows, width, dtype, atol, rtol, device):
    x, y, gate, scale, shift = inputs(batch, rows, width, dtype, device)
    total, h = op.launch(x, y, gate, scale, shift, 1e-6)
    want = reference.gate_residual(x.float(), y.float(), gate)
    torch.testing.assert_close(total.float(), want, atol=atol, rtol=rtol)
    want = reference.adaln(total.float(), scale, shift)  # of the sum as it was rounded
    torch.testing.assert_close(h.float(), want, atol=atol, rtol=rtol)
    assert total.dtype == h.dtype == dtype


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_one_vector_serves_all_images(device):
    x, y, *vectors = inputs(3, 5, 256, torch.float32, device)
    vectors = [each[0] for each in vectors]
    given = [each.expand(3, -1) for each in vectors]
    for own, other in zip(op.launch(x, y, *vectors, 1e-6),
                          op.launch(x, y, *given, 1e-6), strict=True):  # fmt: skip
        assert torch.equal(own, other)


def test_reference_takes_one_vector_for_all_images():
    x, y, *vectors = inputs(3, 5, 64, torch.float32)
    vectors = [each[0] for each in vectors]
    given = [each.expand(3, -1) for each in vectors]
    for own, other in zip(gate_residual_adaln(x, y, *vectors),
                          gate_residual_adaln(x, y, *given), strict=True):  # fmt: skip
        assert torch.equal(own, other)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("batch", "rows", "width"), SHAPES[:3])
def test_quantising_kernel_is_its_reference(batch, rows, width, device):
    x, y, gate, scale, shift = inputs(batch, rows, width, torch.bfloat16, device)
    room = empty_quantized(x, width)
    total, _ = op.launch(x, y, gate, scale, shift, 1e-6, *room)
    plain, _ = op.launch(x, y, gate, scale, shift, 1e-6)
    assert torch.equal(total, plain)
    assert_quantized(*room, reference.adaln(total.float(), scale, shift))


def test_reference_is_the_residual_and_its_norm():
    x, y = torch.randn(2, 2, 5, 64, dtype=torch.bfloat16)
    gate, scale, shift = modulation(2, 64, 3, torch.bfloat16, "cpu")
    total, h = gate_residual_adaln(x, y, gate, scale, shift)
    want = x.double() + gate.double()[:, None] * y.double()
    torch.testing.assert_close(total.double(), want, atol=0, rtol=2**-8)
    assert torch.equal(h, adaln(total, scale, shift))


def test_reference_quantises_what_it_computes():
    x, y = torch.randn(2, 2, 5, 64)
    gate, scale, shift = modulation(2, 64, 3, torch.float32, "cpu")
    total, h = gate_residual_adaln(x, y, gate, scale, shift)
    room = empty_quantized(x, 64)
    again = gate_residual_adaln_quantize(x, y, gate, scale, shift, *room)
    assert torch.equal(total, again)
    assert_quantized(*room, h)


def test_operators_are_well_formed():
    x, y = torch.randn(2, 2, 5, 64, dtype=torch.bfloat16)
    given = (x, y, *modulation(2, 64, 3, torch.bfloat16, "cpu"))
    torch.library.opcheck(overload_of(gate_residual_adaln), given)
    check_quantizing(gate_residual_adaln_quantize, *given, *empty_quantized(x, 64))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"y": torch.zeros(2, 6, 64)}, r"y must be like x = \(2, 5, 64\), got \(2, 6, 64\)"),
        ({"y": torch.zeros(2, 64, 5).transpose(1, 2)}, "y must be contiguous"),
        (
            {"gate": torch.zeros(2, 1, 64)},
            r"gate must be .*\(batch, width\) = \(2, 64\)",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(wrong, message):
    vectors = {name: torch.zeros(2, 64) for name in ("gate", "scale", "shift")}
    right = {"x": torch.zeros(2, 5, 64), "y": torch.zeros(2, 5, 64), **vectors}
    with pytest.raises(ValueError, match=message):
        gate_residual_adaln(**right | wrong)
