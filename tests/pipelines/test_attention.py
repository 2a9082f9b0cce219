"""Every implementation is one softmax over all keys with their biases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redux_pipelines import attention
from redux_pipelines.attention import IMPLEMENTATIONS, Implementation, KeyGroup, choose, reference

CPU = torch.device("cpu")
ON_CPU = [each for each in IMPLEMENTATIONS if "cpu" in each.devices]
ON_GPU = [each for each in IMPLEMENTATIONS if "cuda" in each.devices]


def _qkv(rows, queries=None, *, heads=2, width=16, batch=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, rows, 3, heads, width, generator=generator, dtype=dtype)
    q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
    return q[:, :, -(queries or rows) :], k, v


groups_of_keys = st.lists(
    st.builds(
        KeyGroup,
        rows=st.integers(1, 9),
        bias=st.one_of(
            st.just(-math.inf), st.just(0.0), st.floats(-8, 8).map(lambda value: round(value, 3))
        ),
    ),
    min_size=1,
    max_size=6,
).filter(lambda groups: any(group.bias != -math.inf for group in groups))


@pytest.mark.parametrize("attend", ON_CPU, ids=lambda each: each.name)
@settings(deadline=None)
@given(groups=groups_of_keys, seed=st.integers(0, 1000), queries=st.integers(1, 5))
def test_any_groups_merge_to_one_plain_softmax(attend, groups, seed, queries):
    rows = sum(group.rows for group in groups)
    q, k, v = _qkv(rows, min(queries, rows), seed=seed)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    bias = torch.cat([torch.full((group.rows,), group.bias, dtype=q.dtype) for group in groups])
    expected = (logits + bias).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, tuple(groups)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(reference(q, k, v, tuple(groups)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attend", [*ON_CPU, reference], ids=["biased", "flash-cpu", "reference"])
def test_n_equal_keys_are_one_with_the_logarithm_of_n(attend):
    q, k, v = _qkv(20)
    many = [
        torch.cat([each[:, :, :1].expand(-1, -1, 512, -1), each[:, :, 1:]], 2) for each in (k, v)
    ]
    folded = (KeyGroup(1, math.log(512)), KeyGroup(19, 0.0))
    expected = attend(q, *many, (KeyGroup(531, 0.0),))
    torch.testing.assert_close(attend(q, k, v, folded), expected, rtol=0, atol=1e-12)
    unbiased = attend(q, k, v, (KeyGroup(20, 0.0),))
    assert (unbiased - expected).abs().max() > 0.1


@pytest.mark.parametrize("attend", ON_CPU, ids=lambda each: each.name)
def test_unseen_keys_may_hold_anything(attend):
    q, k, v = _qkv(20, 8)
    groups = (KeyGroup(3, -math.inf), KeyGroup(17, 0.0))
    expected = attend(q, k[:, :, 3:], v[:, :, 3:], groups[1:])
    k[:, :, :3], v[:, :, :3] = 1e6, -1e6
    torch.testing.assert_close(attend(q, k, v, groups), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attend", ON_CPU, ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [16, 64, 128])
def test_implementations_pass_their_own_test_on_a_cpu(attend, dtype, width):
    assert attend.refusal(CPU, dtype, width) is None


@pytest.mark.parametrize("attend", ON_CPU, ids=lambda each: each.name)
def test_a_strong_bias_keeps_its_precision_in_bfloat16(attend):
    q, k, v = _qkv(40, dtype=torch.bfloat16)
    groups = (KeyGroup(1, math.log(512)), KeyGroup(39, 0.0))
    exact = reference(q.double(), k.double(), v.double(), groups)
    assert (attend(q, k, v, groups).double() - exact).norm() / exact.norm() < 5e-3


def _implementation(name, attend, devices=("cpu",)):
    return Implementation(name, attend, devices, (torch.float32,))


def _without_bias(q, k, v, groups):
    return reference(q, k, v, (KeyGroup(k.shape[2], 0.0),))


def _raising(q, k, v, groups):
    raise RuntimeError("no kernel image\nis available")


def _nan(q, k, v, groups):
    return q * math.nan


def test_the_first_that_works_is_chosen_and_the_others_say_why_not():
    candidates = (
        _implementation("elsewhere", reference, ("cuda",)),
        _implementation("raising", _raising),
        _implementation("wrong", _without_bias),
        _implementation("nan", _nan),
        _implementation("right", reference),
        _implementation("never tried", _raising),
    )
    choice = choose(CPU, torch.float32, 16, candidates)
    assert choice.attention.name == "right"
    assert set(choice.refusals) == {"elsewhere", "raising", "wrong", "nan"}
    assert choice.refusals["elsewhere"] == "runs on cuda, not on cpu"
    assert choice.refusals["raising"] == "failed: no kernel image"
    assert choice.refusals["wrong"].startswith("is wrong: relative error")
    assert "nan" in choice.refusals["nan"]


def test_a_dtype_that_is_not_taken_is_said():
    with pytest.raises(RuntimeError, match=r"no attention for .*: only does not take float64"):
        choose(CPU, torch.float64, 16, (_implementation("only", reference),))


def test_a_cpu_takes_the_bias_per_key():
    choice = choose(CPU, torch.float32, 64)
    assert choice.attention.name == "biased"
    assert choice.attention.row_multiple == 1
    assert set(choice.refusals) == {"cudnn", "flash", "efficient"}


def test_the_self_test_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    attention.self_test(reference, CPU, torch.float32, 16)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attend", ON_GPU, ids=lambda each: each.name)
def test_gpu_implementations_are_right_or_refuse(attend):
    device = torch.device("cuda")
    reason = attend.refusal(device, torch.bfloat16, 128)
    assert reason is None or not reason.startswith("is wrong"), reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_finds_an_implementation(dtype):
    assert choose(torch.device("cuda"), dtype, 128).attention.devices == ("cuda",)
