"""Fp8 layers against float64 arithmetic on the very numbers that they hold."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fp8_products import needs_fp8
from redux_kernels import reference
from redux_pipelines.fp8.linear import E4M3, Fp8Linear, project

MAX = 448.0
STEP = 2**-4  # half a step of e4m3, relative
DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(width=48, out=80, dtype=torch.float32):
    return Fp8Linear.of(draw(out, width, seed=1, dtype=dtype), draw(out, seed=2, dtype=dtype))


def exact(fp8, x):
    """The layer's product in float64, from dequantised rows and weights."""
    q, scale = reference.quantize_rows(x)
    weight = fp8.weight.double() * fp8.weight_scale.double()
    return functional.linear(q.double() * scale.double(), weight, fp8.bias.double())


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 48), (1, 67, 48), (3, 33, 48), (5, 48), (2, 3, 4, 48)], ids=str
)
@needs_fp8
def test_product_is_that_of_the_dequantised_numbers(shape, dtype, bound):
    fp8, x = layer(dtype=dtype), draw(*shape, dtype=dtype)
    got = fp8(x)
    assert got.dtype == dtype
    assert got.shape == (*shape[:-1], 80)
    assert error(got, exact(fp8, x)) <= bound


@needs_fp8
def test_rows_may_lie_apart():
    fp8, wide = layer(), draw(2, 9, 100)
    x = wide[:, 2:7, 20:68]
    assert not x.is_contiguous()
    assert torch.equal(fp8(x), fp8(x.contiguous()))


@pytest.mark.parametrize("beside", [None, 16])
@needs_fp8
def test_rows_from_a_fused_kernel_are_taken_as_they_are(beside):
    mlp = draw(2, 7, 48 - (beside or 0))
    other = None if beside is None else draw(2, 7, beside, seed=5)
    q, row_scale = reference.gelu_quantize(mlp, other)
    fp8, h = layer(), reference.gelu(mlp)
    h = h if other is None else torch.cat([other, h], dim=-1)
    got = fp8.forward_quantized(q.flatten(0, 1), row_scale.flatten(0, 1), torch.float32)
    assert torch.equal(got.view(2, 7, -1), fp8(h))
    assert error(got.view(2, 7, -1), exact(fp8, h)) <= 1e-6


@needs_fp8
def test_rows_of_a_fused_norm_are_taken_as_they_are():
    x, scale, shift = draw(2, 7, 48), draw(2, 48, seed=3), draw(2, 48, seed=4)
    fp8, h = layer(), reference.adaln(x, scale, shift)
    q, row_scale = (each.flatten(0, 1) for each in reference.adaln_quantize(x, scale, shift))
    got = fp8.forward_quantized(q, row_scale, torch.float32).view(2, 7, -1)
    assert error(got, exact(fp8, h)) <= 1e-6


@pytest.mark.parametrize("rows", [slice(0, 80), slice(16, 48), slice(64, 80)], ids=str)
@needs_fp8
def test_some_rows_of_the_weight_give_those_columns(rows):
    fp8, x = layer(), draw(2, 5, 48)
    assert error(fp8(x, rows), exact(fp8, x)[..., rows]) <= 1e-6
    assert torch.equal(project(fp8, x, rows), fp8(x, rows))
    linear = nn.Linear(48, 80).requires_grad_(False)
    assert error(project(linear, x, rows), linear(x)[..., rows]) <= 1e-6


def test_each_row_reaches_the_largest_number_of_e4m3_and_none_beyond():
    weight = draw(64, 96) * torch.logspace(-6, 4, 64)[:, None]
    fp8 = Fp8Linear.of(weight, torch.zeros(64))
    assert fp8.weight.dtype == E4M3
    assert fp8.weight_scale.dtype == torch.float32
    largest = fp8.weight.float().abs().amax(1)
    assert (largest == MAX).all()
    expected = weight.abs().amax(1, keepdim=True) / MAX
    torch.testing.assert_close(fp8.weight_scale, expected, rtol=1e-6, atol=0)


def test_a_weight_is_off_by_half_a_step_at_most():
    weight = draw(64, 96) * torch.logspace(-6, 4, 64)[:, None]
    fp8 = Fp8Linear.of(weight, torch.zeros(64))
    off = (fp8.weight.float() * fp8.weight_scale - weight).abs()
    assert (off <= STEP * weight.abs() + fp8.weight_scale * 2**-10 * 1.001).all()


@needs_fp8
def test_rows_of_zeros_stay_zeros():
    fp8 = Fp8Linear.of(torch.zeros(16, 32), draw(16))
    assert torch.equal(fp8(torch.zeros(3, 32)), fp8.bias.expand(3, 16))


@needs_fp8
def test_an_outlier_costs_its_own_row_only():
    weight, x = draw(64, 96), draw(1, 10, 96)
    outlying = x.clone()
    outlying[0, 4, 7] = 3e6
    fp8 = Fp8Linear.of(weight, torch.zeros(64))
    others = [row for row in range(10) if row != 4]
    assert torch.equal(fp8(outlying)[:, others], fp8(x)[:, others])
    assert fp8(outlying).isfinite().all()
    # one scale for the whole tensor would have flushed the other rows to zero or near it
    coarse = (x / (3e6 / MAX)).to(E4M3).float() * (3e6 / MAX)
    assert error(coarse[:, others], x[:, others]) > 5 * error(
        reference.quantize_rows(x)[0].float() * reference.quantize_rows(x)[1], x
    )


@needs_fp8
def test_an_outlier_channel_of_the_weight_costs_its_own_output_only():
    weight, x = draw(64, 96), draw(1, 10, 96)
    outlying = weight.clone()
    outlying[5] *= 1e4
    plain, fp8 = (Fp8Linear.of(each, torch.zeros(64)) for each in (weight, outlying))
    others = [column for column in range(64) if column != 5]
    assert torch.equal(fp8(x)[..., others], plain(x)[..., others])
    assert error(fp8(x)[..., 5], functional.linear(x, outlying)[..., 5]) <= 0.1


@pytest.mark.parametrize("outliers", [False, True])
@needs_fp8
def test_error_of_an_mlp_is_within_its_budget(outliers):
    """Measured: .046, with outliers .048."""
    x, up, down = draw(128, 256), draw(1024, 256) / 16, draw(256, 1024) / 32
    if outliers:
        x[:, ::64] *= 20
    zeros = torch.zeros(1024), torch.zeros(256)
    want = functional.linear(functional.gelu(functional.linear(x, up), approximate="tanh"), down)
    hidden = functional.gelu(Fp8Linear.of(up, zeros[0])(x), approximate="tanh")
    got = Fp8Linear.of(down, zeros[1])(hidden)
    assert 0.01 < error(got, want) <= 0.075


def test_a_layer_made_empty_learns_nothing():
    fp8 = Fp8Linear(32, 16)
    assert {name: tuple(each.shape) for name, each in fp8.named_parameters()} == {
        "columns": (32, 16), "column_scale": (1, 16), "bias": (16,),
    }  # fmt: skip
    assert (fp8.weight.shape, fp8.weight_scale.shape) == ((16, 32), (16, 1))
    assert fp8.weight.is_contiguous()
    assert not any(each.requires_grad for each in fp8.parameters())


@needs_fp8
def test_a_graph_is_captured_whole():
    fp8, x = layer(), draw(2, 5, 48)
    compiled = torch.compile(
        lambda x: project(fp8, x, slice(16, 48)), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(x), fp8(x, slice(16, 48)))
