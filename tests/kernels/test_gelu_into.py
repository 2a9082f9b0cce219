"""GELU into columns of a buffer, against torch in float64 and against the reference."""

import pytest
import torch
from kernel_cases import KERNEL_DEVICES, NAN, TOLERANCES, amid_canaries, canaries_of

from redux_kernels import gelu_into as op
from redux_kernels import reference
from redux_kernels.gelu_into import gelu_into, plan_columns
from redux_kernels.registration import overload_of

SHAPES = [
    pytest.param(1, 2, 12288, id="flux"),
    pytest.param(2, 5, 1024, id="mini"),
    pytest.param(2, 3, 4100, id="tail-of-columns"),
    pytest.param(1, 3, 7, id="odd-width"),
]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize(("batch", "rows", "width"), SHAPES)
def test_kernel_is_its_reference(batch, rows, width, dtype, atol, rtol, device):
    mlp = amid_canaries(batch, rows, width, dtype=dtype, device=device)
    out = amid_canaries(batch, rows, width + 24, dtype=dtype, device=device)
    out.fill_(NAN)
    op.launch(mlp, out, 8)
    want = reference.gelu(mlp)
    torch.testing.assert_close(out[..., 8 : width + 8].float(), want, atol=atol, rtol=rtol)
    assert out[..., :8].isnan().all()
    assert out[..., width + 8 :].isnan().all()
    assert canaries_of(out).isnan().all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_stays_finite_for_any_number(device):
    largest = torch.finfo(torch.bfloat16).max
    values = [0.0, 1e-30, 1.0, 30.0, 1e4, 1e13, largest]
    mlp = torch.tensor([[values, [-each for each in values]]], dtype=torch.bfloat16, device=device)
    out = torch.empty_like(mlp)
    op.launch(mlp, out, 0)
    assert torch.equal(out[0, 0, 3:], mlp[0, 0, 3:])
    assert not out[0, 1, 3:].any()


def test_reference_is_gelu_in_float64():
    mlp, out = torch.randn(2, 3, 8), torch.full((2, 3, 12), NAN)
    gelu_into(mlp, out, column=2)
    want = torch.nn.functional.gelu(mlp.double(), approximate="tanh").float()
    torch.testing.assert_close(out[..., 2:10], want, atol=2e-6, rtol=1e-5)
    assert out[..., [0, 1, 10, 11]].isnan().all()


def test_operator_is_well_formed():
    mlp = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    torch.library.opcheck(
        overload_of(gelu_into), (mlp, torch.zeros(2, 5, 80, dtype=torch.bfloat16), 16)
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"column": 1}, "columns 1 to 65 do not fit into 64 of out"),
        ({"column": -1}, "columns -1 to 63 do not fit"),
        ({"out": torch.zeros(2, 4, 64)}, r"out must be \(batch, rows, columns\) = \(2, 5, 64\)"),
        ({"out": torch.zeros(2, 5, 64, dtype=torch.float16)}, "out must be torch.float32"),
        ({"mlp": torch.zeros(2, 64, 5).transpose(1, 2)}, "mlp must be contiguous"),
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong, message):
    right = {"mlp": torch.zeros(2, 5, 64), "out": torch.zeros(2, 5, 64), "column": 0}
    with pytest.raises(ValueError, match=message):
        gelu_into(**right | wrong)


def test_plan_covers_the_columns():
    assert plan_columns(1, 5337, 12288) == (4096, 4, (5337, 3, 1))
    assert plan_columns(2, 300, 1024) == (1024, 4, (300, 1, 2))
