"""GELU and quantisation of whole rows, against torch and against the reference."""

import pytest
import torch
from kernel_cases import (
    KERNEL_DEVICES,
    amid_canaries,
    assert_quantized,
    check_quantizing,
    quantized_by,
)

from redux_kernels import gelu_quantize as op
from redux_kernels import reference
from redux_kernels.checks import empty_quantized
from redux_kernels.gelu_quantize import gelu_quantize, plan_whole_row

ROOM = empty_quantized(torch.zeros(2, 5, 64), 64)

SHAPES = [
    pytest.param(1, 2, 12288, 3072, id="flux-single-block"),
    pytest.param(1, 2, 12288, 0, id="flux-double-block"),
    pytest.param(2, 3, 1024, 256, id="mini"),
    pytest.param(2, 3, 100, 7, id="odd-widths"),
]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("louder", ["mlp", "beside"])
@pytest.mark.parametrize(("batch", "rows", "width", "extra"), SHAPES)
def test_kernel_is_its_reference(batch, rows, width, extra, louder, device):
    mlp = amid_canaries(batch, rows, width, dtype=torch.bfloat16, device=device)
    mlp.mul_(10 if louder == "mlp" else 1)
    beside = None
    if extra:
        beside = amid_canaries(batch, rows, extra, dtype=torch.bfloat16, device=device)
        beside.mul_(10 if louder == "beside" else 1)
    q, row_scale = quantized_by(op.launch, mlp, extra + width, mlp, beside)
    h = reference.gelu(mlp)
    h = h if beside is None else torch.cat((beside.float(), h), dim=-1)
    assert_quantized(q, row_scale, h)
    wanted, _ = reference.gelu_quantize(mlp, beside)
    assert (q.view(torch.uint8) == wanted.flatten(0, 1).view(torch.uint8)).float().mean() > 0.995


def test_reference_shares_one_scale_between_both_parts():
    mlp, beside = torch.randn(1, 3, 8), 100 * torch.randn(1, 3, 4)
    h = torch.cat((beside, torch.nn.functional.gelu(mlp, approximate="tanh")), dim=-1)
    assert_quantized(*quantized_by(gelu_quantize, mlp, 12, mlp, beside), h)


@pytest.mark.parametrize("extra", [0, 16])
def test_operator_is_well_formed(extra):
    mlp, beside = torch.randn(2, 5, 64), torch.randn(2, 5, extra) if extra else None
    check_quantizing(gelu_quantize, mlp, beside, *empty_quantized(mlp, 64 + extra))


@pytest.mark.parametrize(
    ("mlp", "beside", "message"),
    [
        ((2, 5, 64), (2, 4, 16), r"beside must be \(batch, rows, columns\) = \(2, 5, 16\)"),
        ((2, 5, 20000), None, "mlp must be 1 to 16384 wide"),
        ((5, 64), None, r"mlp must be \(batch, rows, width\)"),
    ],
)
def test_wrong_tensors_are_refused_by_name(mlp, beside, message):
    with pytest.raises(ValueError, match=message):
        gelu_quantize(torch.zeros(mlp), None if beside is None else torch.zeros(beside), *ROOM)


def test_plan_holds_a_row_in_one_program():
    assert plan_whole_row(1, 5337, 12288, 3072) == (16384, 4096, 16, (5337, 1))
