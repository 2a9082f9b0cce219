"""A key counted n times, against attention over n equal keys."""

import math

import pytest
import torch
from kernel_cases import KERNEL_DEVICES, NAN, TOLERANCES, amid_canaries, attention, canaries_of

from redux_kernels import merge_folded_key as op
from redux_kernels import reference
from redux_kernels.merge_folded_key import merge_folded_key, plan_head_rows

SHAPES = [
    pytest.param(1, 2, 37, 128, id="flux-heads-with-a-tail"),
    pytest.param(2, 4, 5, 64, id="mini-heads"),
    pytest.param(1, 1, 1, 16, id="one-row"),
    pytest.param(1, 2, 0, 64, id="no-rows"),
]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize(("batch", "heads", "rows", "d"), SHAPES)
def test_kernel_is_its_reference(batch, heads, rows, d, dtype, atol, rtol, device):
    q, out, into = (
        amid_canaries(batch, heads, rows, d, dtype=dtype, device=device) for _ in range(3)
    )
    k, v = (amid_canaries(batch, heads, d, dtype=dtype, device=device) for _ in range(2))
    lse = amid_canaries(batch, heads, rows, dtype=torch.float32, device=device)
    lse.add_(4)
    into.fill_(NAN)
    op.launch(q, k, v, out, lse, 512.0, into)
    want = torch.empty(into.shape, device=device)
    reference.merge_folded_key(q.float(), k.float(), v.float(), out.float(), lse, 512.0, want)
    torch.testing.assert_close(into.float(), want, atol=max(atol, 2e-6), rtol=rtol)
    assert canaries_of(into).isnan().all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_writes_into_columns_of_a_wider_buffer(device):
    q, out = torch.randn(2, 1, 4, 9, 64, device=device)
    k, v = torch.randn(2, 1, 4, 64, device=device)
    lse = torch.randn(1, 4, 9, device=device)
    wide = torch.full((1, 9, 512), NAN, device=device)
    into = wide[..., 128:384].unflatten(-1, (4, 64)).transpose(1, 2)
    op.launch(q, k, v, out, lse, 3.0, into)
    want = torch.empty_like(out)
    reference.merge_folded_key(q, k, v, out, lse, 3.0, want)
    torch.testing.assert_close(into, want, atol=2e-6, rtol=1e-5)
    assert wide[..., :128].isnan().all()
    assert wide[..., 384:].isnan().all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_copies_attention_for_one_copy(device):
    q, out, into = torch.randn(3, 1, 2, 9, 64, device=device)
    k, v = torch.randn(2, 1, 2, 64, device=device)
    lse = torch.randn(1, 2, 9, device=device)
    op.launch(q, k, v, out, lse, 1.0, into)
    assert torch.equal(into, out)


@pytest.mark.parametrize("copies", [1, 2, 7, 512])
def test_reference_is_attention_over_all_copies(copies):
    q, k, v = torch.randn(3, 2, 3, 11, 16, dtype=torch.float64)
    first = (slice(None), slice(None), slice(0, 1))
    more = (1, 1, copies - 1, 1)
    all_k = torch.cat((k, k[first].repeat(more)), dim=2)
    all_v = torch.cat((v, v[first].repeat(more)), dim=2)
    want, _ = attention(q, all_k, all_v)
    out, lse = attention(q, k, v)
    q, k, v, out, lse = (each.float() for each in (q, k[:, :, 0], v[:, :, 0], out, lse))
    into = torch.empty_like(out)
    merge_folded_key(q, k, v, out, lse, float(copies), into)
    torch.testing.assert_close(into, want.float(), atol=2e-6, rtol=1e-5)


def test_operator_is_well_formed():
    q, out, into = torch.randn(3, 2, 4, 5, 64, dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 4, 64, dtype=torch.bfloat16)
    lse = torch.randn(2, 4, 5)
    torch.library.opcheck(merge_folded_key, (q, k, v, out, lse, 512.0, into))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"copies": 0.5}, "copies must be at least 1, got 0.5"),
        ({"copies": math.nan}, "copies must be at least 1, got nan"),
        ({"k": torch.zeros(2, 4, 1, 64)}, r"k must be \(batch, heads, d\) = \(2, 4, 64\)"),
        ({"q": torch.zeros(2, 4, 6, 64)}, "q must be like out"),
        ({"lse": torch.zeros(2, 4, 5, dtype=torch.bfloat16)}, "lse must be torch.float32"),
        ({"lse": torch.zeros(2, 5, 4).transpose(1, 2)}, "lse must be contiguous"),
        ({"into": torch.zeros(2, 4, 5, 32)}, "into must be like out"),
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong, message):
    right = {
        **{name: torch.zeros(2, 4, 5, 64) for name in ("q", "out", "into")},
        **{name: torch.zeros(2, 4, 64) for name in ("k", "v")},
        "lse": torch.zeros(2, 4, 5),
        "copies": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        merge_folded_key(**right | wrong)


def test_plan_covers_the_rows_of_every_head():
    assert plan_head_rows(1, 24, 5337, 128) == (32, 4, (167, 24, 1))
