"""GroupNorm and SiLU in two passes, against torch's in float64 and against the reference."""

import pytest
import torch
from kernel_cases import KERNEL_DEVICES, TOLERANCES, amid_canaries

from redux_kernels import group_norm_silu as op
from redux_kernels import reference
from redux_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_statistics,
    join_statistics,
    plan_pixels,
)
from redux_kernels.registration import overload_of

SHAPES = [
    pytest.param(1, 300, 128, 32, id="flux"),
    pytest.param(2, 70, 512, 32, id="flux-latents"),
    pytest.param(2, 261, 16, 8, id="mini"),
    pytest.param(1, 100, 96, 6, id="not-a-power-of-two"),
    pytest.param(1, 3, 7, 1, id="one-group-of-odd-width"),
    pytest.param(1, 1, 16, 4, id="one-pixel"),
]


def drawn(batch, rows, channels, groups, dtype=torch.float32, device="cpu"):
    """Pixels amid canaries, whose channels lie far from zero; statistics, weight and bias."""
    x = amid_canaries(batch, rows, channels, dtype=dtype, device=device)
    x += torch.randn(channels, device=device).to(dtype)
    mean = torch.randn(batch, groups, device=device)
    var = torch.rand(batch, groups, device=device) + 0.5
    weight, bias = torch.randn(2, channels, device=device).to(dtype)
    return x, mean, var, weight, bias


def in_float64(x, groups):
    """Mean and variance of ``x (B, S, C)`` by definition."""
    grouped = x.double().unflatten(-1, (groups, -1))
    var, mean = torch.var_mean(grouped, dim=(1, 3), correction=0)
    return mean.float(), var.float()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "rows", "channels", "groups"), SHAPES)
def test_kernel_takes_the_statistics_of_groups(batch, rows, channels, groups, dtype, device):
    x, *_ = drawn(batch, rows, channels, groups, dtype, device)
    for got, want in zip(op.launch_statistics(x, groups), in_float64(x, groups), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_joins_many_chunks_of_several_tiles(device, monkeypatch):
    monkeypatch.setattr(op, "CHUNKS", 3)
    x = torch.randn(1, 1000, 128, device=device)
    assert plan_pixels(1000, 128)[3:] == (11, 3)  # tiles a chunk, chunks: the last one is short
    for got, want in zip(op.launch_statistics(x, 32), in_float64(x, 32), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernels_keep_precision_far_from_zero(device):
    x = torch.randn(1, 300, 16, device=device) + 1000
    mean, var = op.launch_statistics(x, 4)
    torch.testing.assert_close(var, in_float64(x, 4)[1], atol=0, rtol=1e-3)
    one, zero = torch.ones(16, device=device), torch.zeros(16, device=device)
    y = op.launch(x, mean, var, one, zero, 1e-6)
    want = torch.nn.functional.group_norm(x.double().transpose(1, 2), 4, eps=1e-6)
    want = torch.nn.functional.silu(want).transpose(1, 2).float()
    torch.testing.assert_close(y, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize(("batch", "rows", "channels", "groups"), SHAPES)
def test_kernel_is_its_reference(batch, rows, channels, groups, dtype, atol, rtol, device):
    x, *rest = drawn(batch, rows, channels, groups, dtype, device)
    got = op.launch(x, *rest, 1e-6)
    want = reference.group_norm_silu(x.double(), *rest)
    assert got.dtype == dtype
    assert got.is_contiguous()
    torch.testing.assert_close(got.float(), want.float(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_stays_finite_for_any_number(device):
    x = torch.tensor([[[-1e30, -100.0, 0.0, 100.0, 1e30]]], device=device).expand(1, 2, 5)
    zero, one = torch.zeros(1, 1, device=device), torch.ones(1, 1, device=device)
    y = op.launch(x, zero, one, one[0].expand(5).clone(), zero[0].expand(5).clone(), 0.0)
    assert torch.equal(y[0, 0, [0, 2, 3, 4]], x[0, 0, [0, 2, 3, 4]].clamp_min(0))
    assert y[0, 0, 1].abs() < 1e-30


def test_reference_is_group_norm_and_silu_in_float64():
    x, weight, bias = torch.randn(2, 70, 24) + 2, torch.randn(24), torch.randn(24)
    norm = torch.nn.functional.group_norm
    want = norm(x.double().transpose(1, 2), 6, weight.double(), bias.double(), 1e-6)
    want = torch.nn.functional.silu(want).transpose(1, 2)
    got = group_norm_silu(x, *group_norm_statistics(x, 6), weight, bias)
    torch.testing.assert_close(got.double(), want, atol=4e-6, rtol=1e-5)


def test_statistics_of_parts_are_those_of_the_whole():
    x, sizes = torch.randn(2, 100, 16) + torch.arange(100)[:, None] / 10, (1, 70, 29)
    parts = [group_norm_statistics(part, 4) for part in x.split(sizes, dim=1)]
    for got, want in zip(join_statistics(parts, sizes), in_float64(x, 4), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operators_are_well_formed(dtype):
    x, *rest = drawn(2, 5, 16, 4, dtype)
    torch.library.opcheck(overload_of(group_norm_statistics), (x, 4))
    torch.library.opcheck(overload_of(group_norm_silu), (x, *rest))


RIGHT = dict(zip(("x", "mean", "var", "weight", "bias"), drawn(2, 5, 16, 4), strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(5, 16)}, r"x must be \(batch, rows, width\)"),
        ({"x": torch.zeros(2, 16, 5).transpose(1, 2)}, "x must be contiguous"),
        ({"weight": torch.zeros(15)}, r"weight must be \(channels,\) = \(16,\), got \(15,\)"),
        ({"mean": torch.zeros(2, 5)}, "groups dividing the 16 channels of x"),
        ({"var": torch.zeros(1, 4)}, r"var must be \(batch, groups\) = \(2, 4\)"),
        ({"var": torch.zeros(2, 4, dtype=torch.float16)}, "var must be torch.float32"),
        ({"mean": torch.zeros(4, 2).t()}, "mean must be contiguous"),
        ({"bias": torch.zeros(16, device="meta")}, "on one device"),
    ],
)
def test_wrong_tensors_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**RIGHT | wrong)


@pytest.mark.parametrize(
    ("shape", "groups", "message"),
    [
        ((1, 5, 16), 5, "groups must divide the 16 channels of x, got 5"),
        ((1, 5, 16), 0, "groups must divide"),
        ((1, 0, 16), 4, "at least one row"),
    ],
)
def test_wrong_groups_are_refused(shape, groups, message):
    with pytest.raises(ValueError, match=message):
        group_norm_statistics(torch.zeros(shape), groups)


def test_plan_shares_a_picture_among_a_thousand_programs():
    assert plan_pixels(1024 * 1024, 128) == (32, 128, 4, 32, 1024)
    assert plan_pixels(128 * 128, 512) == (8, 512, 4, 2, 1024)
    assert plan_pixels(9, 16) == (256, 16, 4, 1, 1)
