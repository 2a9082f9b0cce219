"""Quantisation of rows, against the numbers themselves and against the reference."""

import pytest
import torch
from kernel_cases import (
    KERNEL_DEVICES,
    amid_canaries,
    assert_quantized,
    canaries_of,
    check_quantizing,
    quantized_by,
)

from redux_kernels import quantize_rows as op
from redux_kernels import reference
from redux_kernels.checks import empty_quantized
from redux_kernels.quantize_rows import quantize_rows

ROOM = empty_quantized(torch.zeros(1, 5, 64), 64)

SHAPES = [
    pytest.param(1, 2, 3072, id="flux"),
    pytest.param(2, 11, 256, id="mini"),
    pytest.param(2, 3, 100, id="odd-width"),
    pytest.param(1, 1, 1, id="one-number"),
]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "rows", "width"), SHAPES)
def test_kernel_is_its_reference(batch, rows, width, dtype, device):
    x = amid_canaries(batch, rows, width, dtype=dtype, device=device)
    x.mul_(torch.logspace(-6, 4, rows, device=device)[:, None])  # each row has its own scale
    q, row_scale = quantized_by(op.launch, x, width, x)
    assert_quantized(q, row_scale, x.float())
    assert canaries_of(x).isnan().all()
    wanted, wanted_scale = reference.quantize_rows(x)
    torch.testing.assert_close(row_scale, wanted_scale.flatten(0, 1), rtol=1e-6, atol=0)
    assert (q.view(torch.uint8) == wanted.flatten(0, 1).view(torch.uint8)).float().mean() > 0.995


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_row_of_zeros_stays_zeros(device):
    x = torch.randn(1, 3, 64, device=device)
    x[:, 1] = 0
    q, row_scale = quantized_by(op.launch, x, 64, x)
    assert not q[1].float().any()
    assert row_scale.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 1, 17)], ids=str)
def test_operator_is_well_formed(shape):
    x = torch.randn(*shape)
    check_quantizing(quantize_rows, x, *empty_quantized(x, shape[-1]))


def test_operator_takes_rows_that_lie_apart():
    x = torch.randn(2, 9, 100)[:, 2:7, 20:68]
    assert_quantized(*quantized_by(quantize_rows, x, 48, x), x)


@pytest.mark.parametrize(
    ("room", "message"),
    [
        ((ROOM[0].float(), ROOM[1]), "q must be torch.float8_e4m3fn, got torch.float32"),
        ((ROOM[0][:4], ROOM[1]), r"q must be .* = \(5, 64\), got \(4, 64\)"),
        ((ROOM[0].new_empty(64, 5).t(), ROOM[1]), r"q must be contiguous, got strides \(1, 5\)"),
        ((ROOM[0], ROOM[1].double()), "row_scale must be torch.float32, got torch.float64"),
        ((ROOM[0], ROOM[1].t()), r"row_scale must be .* = \(5, 1\), got \(1, 5\)"),
        ((ROOM[0], ROOM[1].to("meta")), "on one device"),
    ],
    ids=["dtype", "rows", "strides", "dtype of scales", "scales beside each other", "device"],
)
def test_wrong_room_is_refused_by_name(room, message):
    with pytest.raises(ValueError, match=message):
        quantize_rows(torch.zeros(1, 5, 64), *room)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 64), r"x must be \(batch, rows, width\), got shape \(5, 64\)"),
        (torch.zeros(1, 5, 20000), "x must be 1 to 16384 wide, got 20000"),
        (torch.zeros(1, 64, 5).transpose(1, 2), "x must be contiguous along its last axis"),
        (torch.zeros(1, 5, 64, dtype=torch.int32), "x must be bfloat16, float16 or float32"),
    ],
    ids=["flat", "wide", "transposed", "integers"],
)
def test_wrong_tensors_are_refused_by_name(x, message):
    with pytest.raises(ValueError, match=message):
        quantize_rows(x, *ROOM)
