"""Attention over two groups of keys, against attention over both with a bias."""

import math

import pytest
import torch
from kernel_cases import KERNEL_DEVICES, NAN, TOLERANCES, amid_canaries, attention, canaries_of

from redux_kernels import merge_lse as op
from redux_kernels import reference
from redux_kernels.merge_lse import merge_lse

SHAPES = [
    pytest.param(1, 2, 37, 128, id="flux-heads-with-a-tail"),
    pytest.param(2, 4, 5, 64, id="mini-heads"),
    pytest.param(1, 2, 0, 64, id="no-rows"),
]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize(("batch", "heads", "rows", "d"), SHAPES)
def test_kernel_is_its_reference(batch, heads, rows, d, dtype, atol, rtol, device):
    a, b, into = (
        amid_canaries(batch, heads, rows, d, dtype=dtype, device=device) for _ in range(3)
    )
    lse_a, lse_b = (
        amid_canaries(batch, heads, rows, dtype=torch.float32, device=device) for _ in range(2)
    )
    into.fill_(NAN)
    bias = torch.tensor([0.7, -1.0], device=device)[:batch]
    lse = op.launch(a, lse_a, b, lse_b, bias, into)
    want = torch.empty(into.shape, device=device)
    want_lse = reference.merge_lse(a.float(), lse_a, b.float(), lse_b, bias, want)
    torch.testing.assert_close(into.float(), want, atol=max(atol, 2e-6), rtol=rtol)
    torch.testing.assert_close(lse, want_lse, atol=1e-6, rtol=1e-6)
    assert canaries_of(into).isnan().all()


def empty_groups(device):
    """Four rows: keys in both groups, in a only, in b only, in none."""
    a, b = torch.randn(2, 1, 1, 4, 16, device=device)
    lse_a = torch.tensor([[[1.0, 2.0, -math.inf, -math.inf]]], device=device)
    lse_b = torch.tensor([[[1.0, -math.inf, 2.0, -math.inf]]], device=device)
    return a, lse_a, b, lse_b


def assert_empty_groups_are_left_out(a, b, into, lse):
    torch.testing.assert_close(into[0, 0, 0], (a[0, 0, 0] + b[0, 0, 0]) / 2)
    torch.testing.assert_close(into[0, 0, 1], a[0, 0, 1])
    torch.testing.assert_close(into[0, 0, 2], b[0, 0, 2])
    torch.testing.assert_close(into[0, 0, 3], a[0, 0, 3])
    wanted = [1 + math.log(2), 2.0, 2.0, -math.inf]
    torch.testing.assert_close(lse, torch.tensor([[wanted]], device=lse.device))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_leaves_empty_groups_out(device):
    a, lse_a, b, lse_b = empty_groups(device)
    into, bias = torch.empty_like(a), torch.zeros(1, device=device)
    assert_empty_groups_are_left_out(a, b, into, op.launch(a, lse_a, b, lse_b, bias, into))


def test_reference_leaves_empty_groups_out():
    a, lse_a, b, lse_b = empty_groups("cpu")
    into, bias = torch.empty_like(a), torch.zeros(1)
    assert_empty_groups_are_left_out(a, b, into, merge_lse(a, lse_a, b, lse_b, bias, into))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_leaves_out_a_group_of_weight_zero(device):
    a, b, into = torch.randn(3, 1, 2, 9, 64, device=device)
    lse_a, lse_b = torch.randn(2, 1, 2, 9, device=device)
    lse = op.launch(a, lse_a, b, lse_b, torch.tensor([-math.inf], device=device), into)
    assert torch.equal(into, a)
    torch.testing.assert_close(lse, lse_a)


def test_reference_is_attention_over_both_groups_with_a_bias():
    q, k, v = torch.randn(3, 2, 3, 11, 16, dtype=torch.float64)
    strength = math.log(0.3)
    bias = torch.zeros(11, dtype=torch.float64)
    bias[6:] = strength
    want, want_lse = attention(q, k, v, bias)
    a, lse_a = (each.float() for each in attention(q, k[:, :, :6], v[:, :, :6]))
    b, lse_b = (each.float() for each in attention(q, k[:, :, 6:], v[:, :, 6:]))
    into = torch.empty_like(a)
    lse = merge_lse(a, lse_a, b, lse_b, torch.full((2,), strength), into)
    torch.testing.assert_close(into, want.float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), atol=1e-6, rtol=1e-6)


def test_operator_is_well_formed():
    a, b, into = torch.randn(3, 2, 4, 5, 64, dtype=torch.bfloat16)
    lse_a, lse_b = torch.randn(2, 2, 4, 5)
    torch.library.opcheck(merge_lse, (a, lse_a, b, lse_b, torch.randn(2), into))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"out_b": torch.zeros(2, 4, 6, 64)}, r"lse must be .* = \(2, 4, 6\), got \(2, 4, 5\)"),
        ({"bias_b": torch.zeros(())}, r"bias_b must be \(batch,\) = \(2,\), got \(\)"),
        ({"into": torch.zeros(2, 4, 5, 64, dtype=torch.float16)}, "into must be torch.float32"),
        ({"out_a": torch.zeros(2, 4, 5, 48)}, "out must have a head size in"),
    ],
)
def test_wrong_tensors_are_refused_by_name(wrong, message):
    right = {
        **{name: torch.zeros(2, 4, 5, 64) for name in ("out_a", "out_b", "into")},
        **{name: torch.zeros(2, 4, 5) for name in ("lse_a", "lse_b")},
        "bias_b": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        merge_lse(**right | wrong)
