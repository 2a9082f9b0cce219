"""Attention with a bias per key, against a softmax that holds all its logits."""

import math

import pytest
import torch
from kernel_cases import KERNEL_DEVICES, NAN, amid_canaries, canaries_of

from redux_kernels import attention as op
from redux_kernels import reference
from redux_kernels.attention import biased_attention
from redux_kernels.registration import overload_of

ERRORS = [
    pytest.param(torch.bfloat16, 2**-8, id="bfloat16"),
    pytest.param(torch.float16, 2**-10, id="float16"),
    pytest.param(torch.float32, 2e-6, id="float32"),
]
"""(dtype, largest error) for values up to 1: weights are rounded before the second product."""

SHAPES = [
    pytest.param(1, 2, 130, 150, 128, id="flux-heads-with-tails"),
    pytest.param(2, 3, 37, 201, 64, id="mini-heads-fewer-queries"),
    pytest.param(1, 1, 64, 128, 64, id="whole-tiles"),
    pytest.param(1, 1, 3, 1, 16, id="one-key"),
    pytest.param(1, 2, 0, 5, 64, id="no-queries"),
]


def exact(q, k, v, bias):
    """The definition, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias.double()
    return logits.softmax(dim=-1) @ v


def biases(keys, device="cpu"):
    """Unseen keys first, then one that counts for 512, some that count less."""
    bias = torch.zeros(keys, device=device)
    bias[: keys // 2] = -math.inf
    bias[keys // 2] = math.log(512)
    bias[keys // 2 + 1 :: 3] = -1.5
    return bias


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("dtype", "error"), ERRORS)
@pytest.mark.parametrize(("batch", "heads", "queries", "keys", "d"), SHAPES)
def test_kernel_is_the_definition(batch, heads, queries, keys, d, dtype, error, device):
    q, out = (amid_canaries(batch, heads, queries, d, dtype=dtype, device=device) for _ in range(2))
    k, v = (amid_canaries(batch, heads, keys, d, dtype=dtype, device=device) for _ in range(2))
    v.clamp_(-1, 1)
    out.fill_(NAN)
    bias = amid_canaries(1, keys, dtype=torch.float32, device=device)[0]
    bias.copy_(biases(keys, device))
    op.launch(q, k, v, bias, out)
    torch.testing.assert_close(out.double(), exact(q, k, v, bias), atol=error, rtol=0)
    assert canaries_of(out).isnan().all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_reads_rows_before_heads(device):
    """As the network lays them out: q and k beside each other, v in a wider buffer."""
    qk = torch.randn(2, 90, 2, 4, 64, device=device)
    wide = torch.randn(2, 90, 7, 4, 64, device=device)
    q, k = (each.transpose(1, 2) for each in qk.unbind(2))
    q, v, bias = q[:, :, 20:], wide[:, :, 2].transpose(1, 2), biases(90, device)
    out = op.empty_out(q)
    op.launch(q, k, v, bias, out)
    torch.testing.assert_close(out.double(), exact(q, k, v, bias), atol=1e-5, rtol=0)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_never_overflows(device):
    """Logits of ±1000, of which exp overflows, and a bias that no float32 sum would survive."""
    q, k, v = 30 * torch.randn(3, 1, 1, 70, 64, device=device)
    bias = torch.zeros(70, device=device)
    bias[3], bias[64:] = -1e30, 200.0
    out = op.empty_out(q)
    op.launch(q, k, v, bias, out)
    torch.testing.assert_close(out.double(), exact(q, k, v, bias), atol=0.02, rtol=1e-3)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_counts_a_folded_key_as_all_its_copies(device):
    q, k, v = torch.randn(3, 1, 2, 40, 64, device=device)
    bias = torch.zeros(40, device=device)
    bias[0] = math.log(512)
    out = op.empty_out(q)
    op.launch(q, k, v, bias, out)
    many = [torch.cat([x[:, :, :1].expand(-1, -1, 511, -1), x], dim=2) for x in (k, v)]
    want = exact(q, *many, torch.zeros(551, device=device))
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "error"), ERRORS)
def test_reference_is_the_definition(dtype, error):
    q, k, v = (torch.randn(2, 3, rows, 64).clamp(-1, 1).to(dtype) for rows in (11, 50, 50))
    got = biased_attention(q, k, v, biases(50))
    torch.testing.assert_close(got.double(), exact(q, k, v, biases(50)), atol=error, rtol=0)


def test_operator_is_well_formed():
    q, k, v = torch.randn(3, 2, 4, 9, 64, dtype=torch.bfloat16)
    torch.library.opcheck(overload_of(biased_attention), (q[:, :, 5:], k, v, torch.randn(9)))


def test_a_gpu_that_never_passed_the_self_test_runs_the_reference(monkeypatch):
    monkeypatch.setattr(op, "launch", lambda *_: pytest.fail("launched"))
    q, k, v = torch.randn(3, 1, 1, 4, 16)
    want = reference.biased_attention(q, k, v, torch.zeros(4))
    assert torch.equal(biased_attention(q, k, v, torch.zeros(4)), want)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": torch.zeros(2, 4, 6, 64)}, r"v must be .* = \(2, 4, 6, 64\), got \(2, 4, 5, 64\)"),
        ({"bias": torch.zeros(4)}, r"bias must be \(keys,\) = \(5,\), got \(4,\)"),
        ({"bias": torch.zeros(5).double()}, "bias must be torch.float32"),
        ({"v": torch.zeros(2, 4, 5, 64).half()}, "v must be torch.float32, got torch.float16"),
        ({"q": torch.zeros(2, 4, 3, 48)}, "q must have a head size in"),
        ({"q": torch.zeros(2, 4, 64, 3).transpose(2, 3)}, "contiguous along its last axis"),
    ],
)
def test_wrong_tensors_are_refused_by_name(wrong, message):
    right = {"q": torch.zeros(2, 4, 3, 64), "bias": torch.zeros(5)}
    right |= {name: torch.zeros(2, 4, 5, 64) for name in ("k", "v")}
    with pytest.raises(ValueError, match=message):
        biased_attention(**right | wrong)
