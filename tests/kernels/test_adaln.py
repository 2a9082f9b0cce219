"""LayerNorm and modulation, against torch in float64 and against the reference."""

import pytest
import torch
from kernel_cases import (
    KERNEL_DEVICES,
    TOLERANCES,
    amid_canaries,
    assert_quantized,
    check_quantizing,
    modulation,
    quantized_by,
)

from redux_kernels import adaln as op
from redux_kernels import reference
from redux_kernels.adaln import adaln, adaln_quantize, plan_rows
from redux_kernels.checks import empty_quantized
from redux_kernels.registration import overload_of

SHAPES = [
    pytest.param(1, 3, 3072, id="flux"),
    pytest.param(2, 9, 256, id="mini-with-a-tail-of-rows"),
    pytest.param(2, 5, 100, id="odd-width"),
    pytest.param(1, 1, 1, id="one-element"),
    pytest.param(1, 0, 256, id="no-rows"),
]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize(("batch", "rows", "width"), SHAPES)
def test_kernel_is_its_reference(batch, rows, width, dtype, atol, rtol, device):
    x = amid_canaries(batch, rows, width, dtype=dtype, device=device)
    scale, shift = modulation(batch, width, 2, dtype, device)
    got = op.launch(x, scale, shift, 1e-6)
    want = reference.adaln(x.float(), scale, shift)
    assert got.dtype == dtype
    assert got.is_contiguous()
    torch.testing.assert_close(got.float(), want, atol=atol, rtol=rtol)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("batch", "rows", "width"), SHAPES[:3])
def test_quantising_kernel_is_its_reference(batch, rows, width, device):
    x = amid_canaries(batch, rows, width, dtype=torch.bfloat16, device=device)
    x[..., 7] *= 50  # an outlier channel, as FLUX has
    scale, shift = modulation(batch, width, 2, torch.bfloat16, device)
    q, row_scale = quantized_by(op.launch, x, width, x, scale, shift, 1e-6)
    assert_quantized(q, row_scale, reference.adaln(x.float(), scale, shift))
    wanted, _ = reference.adaln_quantize(x, scale, shift)
    assert (q.view(torch.uint8) == wanted.flatten(0, 1).view(torch.uint8)).float().mean() > 0.995


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_quantises_a_row_of_zeros_to_zeros(device):
    x = torch.randn(1, 2, 256, device=device)
    modulated = x, -torch.ones_like(x[:, 0]), x[:, 0] * 0, 1e-6
    q, row_scale = quantized_by(op.launch, x, 256, *modulated)
    assert not q.float().any()
    assert torch.isfinite(row_scale).all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_keeps_precision_far_from_zero(device):
    x = torch.randn(1, 4, 3072, device=device) + 1000
    zero = torch.zeros(1, 3072, device=device)
    got = op.launch(x, zero, zero, 1e-6)
    want = torch.nn.functional.layer_norm(x.double(), (3072,), eps=1e-6).float()
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_images_may_share_one_modulation(device):
    x = torch.randn(3, 2, 256, device=device)
    scale, shift = (each.expand(3, -1) for each in modulation(1, 256, 2, torch.float32, device))
    got = op.launch(x, scale, shift, 1e-6)
    torch.testing.assert_close(got, reference.adaln(x, scale, shift), atol=2e-6, rtol=1e-5)


@pytest.mark.gpu
def test_kernel_reaches_rows_beyond_two_to_the_31_elements():
    if torch.cuda.get_device_properties("cuda").total_memory < 16 * 2**30:
        pytest.skip("needs a GPU with 16 GiB")
    x = torch.zeros(1, 700_001, 3072, dtype=torch.bfloat16, device="cuda")
    x[:, -3:] = torch.randn(3, 3072)
    scale, shift = modulation(1, 3072, 2, torch.bfloat16, "cuda")
    got = op.launch(x, scale, shift, 1e-6)
    want = reference.adaln(x[:, -3:].float(), scale, shift)
    torch.testing.assert_close(got[:, -3:].float(), want, atol=1e-5, rtol=2**-8)


def test_reference_is_layer_norm_and_modulation_in_float64():
    x, scale, shift = torch.randn(2, 5, 64), torch.randn(2, 64), torch.randn(2, 64)
    norm = torch.nn.functional.layer_norm(x.double(), (64,), eps=1e-6)
    want = norm * (1 + scale.double()[:, None]) + shift.double()[:, None]
    torch.testing.assert_close(adaln(x, scale, shift).double(), want, atol=2e-6, rtol=1e-5)


def test_reference_quantises_what_it_computes():
    x, scale, shift = torch.randn(2, 5, 64), torch.randn(2, 64), torch.randn(2, 64)
    room = quantized_by(adaln_quantize, x, 64, x, scale, shift)
    assert_quantized(*room, adaln(x, scale, shift))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operators_are_well_formed(dtype):
    x = torch.randn(2, 5, 64, dtype=dtype)
    given = (x, *modulation(2, 64, 2, dtype, "cpu"))
    torch.library.opcheck(overload_of(adaln), given)
    check_quantizing(adaln_quantize, *given, *empty_quantized(x, 64))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(5, 64)}, r"x must be \(batch, rows, width\)"),
        ({"x": torch.zeros(2, 5, 64, dtype=torch.int32)}, "x must be bfloat16, float16 or float32"),
        ({"x": torch.zeros(2, 64, 5).transpose(1, 2)}, "contiguous along its last axis"),
        ({"x": torch.zeros(1, 1, 20000)}, "1 to 16384 wide, got 20000"),
        ({"scale": torch.zeros(1, 64)}, r"scale must be .* = \(2, 64\), got \(1, 64\)"),
        ({"shift": torch.zeros(2, 128)[:, ::2]}, "shift must be contiguous"),
        ({"shift": torch.zeros(2, 64, device="meta")}, "on one device"),
    ],
)
def test_wrong_tensors_are_refused_by_name(wrong, message):
    right = {"x": torch.zeros(2, 5, 64), "scale": torch.zeros(2, 64), "shift": torch.zeros(2, 64)}
    with pytest.raises(ValueError, match=message):
        adaln(**right | wrong)


def test_plan_keeps_a_wide_row_in_one_program_and_gathers_narrow_ones():
    assert plan_rows(1, 5337, 3072) == (1, 4096, 4, (5337, 1))
    assert plan_rows(2, 9, 256) == (8, 256, 2, (2, 2))
