"""Every implementation is one softmax over all keys with their biases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redux_pipelines.attention import backends
from redux_pipelines.attention import groups as groups_module
from redux_pipelines.attention.backends import IMPLEMENTATIONS
from redux_pipelines.attention.choice import refusal
from redux_pipelines.attention.groups import Capabilities, KeyGroup, reference

CPU = torch.device("cpu")
ON_CPU = [each for each in IMPLEMENTATIONS if "cpu" in each.devices]
NAMES_ON_CPU = [each.name for each in ON_CPU]
ON_GPU = [each for each in IMPLEMENTATIONS if "cuda" in each.devices]


def _exact(attend):
    """The most precise dtype it takes, and how near to the truth that is."""
    takes_double = torch.float64 in getattr(attend, "dtypes", (torch.float64,))
    return (torch.float64, 1e-12) if takes_double else (torch.float32, 1e-5)


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
    dtype, atol = _exact(attend)
    q, k, v = _qkv(rows, min(queries, rows), seed=seed, dtype=dtype)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    bias = torch.cat([torch.full((group.rows,), group.bias, dtype=q.dtype) for group in groups])
    expected = (logits + bias).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, tuple(groups)), expected, rtol=0, atol=atol)
    torch.testing.assert_close(reference(q, k, v, tuple(groups)), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("attend", [*ON_CPU, reference], ids=[*NAMES_ON_CPU, "reference"])
def test_n_equal_keys_are_one_with_the_logarithm_of_n(attend):
    dtype, atol = _exact(attend)
    q, k, v = _qkv(20, dtype=dtype)
    many = [
        torch.cat([each[:, :, :1].expand(-1, -1, 512, -1), each[:, :, 1:]], 2) for each in (k, v)
    ]
    folded = (KeyGroup(1, math.log(512)), KeyGroup(19, 0.0))
    expected = reference(q.double(), *(each.double() for each in many), (KeyGroup(531, 0.0),))
    expected = expected.to(dtype)
    torch.testing.assert_close(attend(q, k, v, folded), expected, rtol=0, atol=atol)
    unbiased = attend(q, k, v, (KeyGroup(20, 0.0),))
    assert (unbiased - expected).abs().max() > 0.1


@pytest.mark.parametrize("attend", [*ON_CPU, backends.triton, reference], ids=[
    *NAMES_ON_CPU, "triton", "reference"])  # fmt: skip
@pytest.mark.parametrize("groups", [(KeyGroup(12, 0.0),), (KeyGroup(5, -1.0), KeyGroup(7, 0.0))])
def test_result_is_written_where_it_is_wanted(attend, groups):
    q, k, v = _qkv(12, 7, batch=2, dtype=torch.float32)
    wide = torch.full((2, 7, 5 * 32), math.nan)
    into = wide[..., 32:64].unflatten(-1, (2, 16)).transpose(1, 2)
    assert attend(q, k, v, groups, into) is into
    assert torch.equal(into, attend(q, k, v, groups))
    assert wide[..., :32].isnan().all()
    assert wide[..., 64:].isnan().all()


@pytest.mark.parametrize("attend", ON_CPU, ids=lambda each: each.name)
def test_unseen_keys_may_hold_anything(attend):
    dtype, atol = _exact(attend)
    q, k, v = _qkv(20, 8, dtype=dtype)
    groups = (KeyGroup(3, -math.inf), KeyGroup(17, 0.0))
    expected = attend(q, k[:, :, 3:], v[:, :, 3:], groups[1:])
    k[:, :, :3], v[:, :, :3] = 1e6, -1e6
    torch.testing.assert_close(attend(q, k, v, groups), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("attend", ON_CPU, ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [16, 64, 128])
def test_implementations_pass_their_own_test_on_a_cpu(attend, dtype, width):
    told = refusal(attend, CPU, dtype, width)
    assert told == (None if dtype in attend.dtypes else f"does not take {str(dtype)[6:]}")


IN_HALF = [each for each in ON_CPU if torch.bfloat16 in each.dtypes]


@pytest.mark.parametrize("attend", IN_HALF, ids=lambda each: each.name)
def test_a_strong_bias_keeps_its_precision_in_bfloat16(attend):
    q, k, v = _qkv(40, dtype=torch.bfloat16)
    groups = (KeyGroup(1, math.log(512)), KeyGroup(39, 0.0))
    exact = reference(q.double(), k.double(), v.double(), groups)
    assert (attend(q, k, v, groups).double() - exact).norm() / exact.norm() < 5e-3


@pytest.mark.parametrize("attend", ON_CPU, ids=lambda each: each.name)
def test_many_rows_merge_to_one_plain_softmax_in_float32(attend):
    """More keys than any kernel's tile."""
    groups = (KeyGroup(3, -math.inf), KeyGroup(1, math.log(512)), KeyGroup(300, -1.0))
    groups = (*groups, KeyGroup(701, 0.0))
    q, k, v = _qkv(1005, 90, width=64, batch=2, dtype=torch.float32)
    exact = reference(q.double(), k.double(), v.double(), groups)
    torch.testing.assert_close(attend(q, k, v, groups).double(), exact, rtol=0, atol=1e-5)


def test_few_keys_are_left_to_one_call_of_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(backends, "attend_in_blocks", lambda *given: calls.append(given))
    (onednn,) = (each for each in ON_CPU if each.name == "onednn")
    for rows in (backends.FEW_KEYS - 1, backends.FEW_KEYS):
        q, k, v = _qkv(rows, 3, dtype=torch.float32)
        onednn(q, k, v, (KeyGroup(rows, 0.0),))
    assert [given[1].shape[2] for given in calls] == [backends.FEW_KEYS]


def test_our_kernels_reference_is_one_plain_softmax():
    """What the operator computes where its kernel may not run."""
    groups = (KeyGroup(3, -math.inf), KeyGroup(1, math.log(512)), KeyGroup(30, -1.0))
    q, k, v = _qkv(34, 9, dtype=torch.float32)
    exact = reference(q.double(), k.double(), v.double(), groups)
    got = backends.triton(q, k, v, groups)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_biases_are_written_out_in_order(dtype):
    groups = (KeyGroup(2, -math.inf), KeyGroup(1, 0.5), KeyGroup(2, 0.0), KeyGroup(1, -3.0))
    bias = groups_module.key_bias(groups, CPU, dtype)
    assert bias.dtype == dtype
    assert bias.shape == (1, 1, 1, 6)
    assert bias.flatten().tolist() == [-math.inf, -math.inf, 0.5, 0.0, 0.0, -3.0]


@pytest.mark.parametrize(
    ("capabilities", "inside", "outside", "text"),
    [
        (Capabilities((8, 0)), [(8, 0), (8, 9), (12, 0)], [(7, 5)], "8.0 or higher"),
        (Capabilities((9, 0), 9), [(9, 0)], [(8, 9), (10, 0)], "9.0 to 9.x"),
        (Capabilities((8, 9), 12), [(8, 9), (12, 1)], [(8, 6), (13, 0)], "8.9 to 12.x"),
    ],
    ids=str,
)
def test_capabilities_are_a_range(capabilities, inside, outside, text):
    assert all(each in capabilities for each in inside)
    assert not any(each in capabilities for each in outside)
    assert str(capabilities) == text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attend", ON_GPU, ids=lambda each: each.name)
def test_gpu_implementations_are_right_or_refuse(attend, dtype, width):
    reason = refusal(attend, torch.device("cuda"), dtype, width)
    assert reason is None or not reason.startswith("is wrong"), reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attend", ON_GPU, ids=lambda each: each.name)
def test_gpu_implementations_are_exact_at_a_pictures_size(attend):
    """4826 rows: 1024 x 1024 with its text folded, and a batch of two."""
    if reason := refusal(attend, torch.device("cuda"), torch.bfloat16, 128):
        pytest.skip(f"{attend.name} {reason}")
    groups = (KeyGroup(6, -math.inf), KeyGroup(1, math.log(512)), KeyGroup(729, -0.5))
    groups = (*groups, KeyGroup(4096, 0.0))
    q, k, v = (x.cuda() for x in _qkv(4832, 300, width=128, batch=2, dtype=torch.bfloat16))
    exact = reference(q.float(), k.float(), v.float(), groups)
    assert (attend(q, k, v, groups).float() - exact).norm() / exact.norm() < 1e-2


def _plain(q, k, v):
    """A ``Partial`` in plain torch."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return logits.softmax(-1) @ v, logits.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_folded_key_gets_its_copies_after_one_call(hidden, batch):
    calls = []

    def partial(q, k, v):
        calls.append(k.shape[2])
        return _plain(q, k, v)

    q, k, v = _qkv(20 + hidden, 9, batch=batch, dtype=torch.float32)
    seen = (KeyGroup(1, math.log(512)), KeyGroup(19, 0.0))
    groups = (KeyGroup(hidden, -math.inf), *seen) if hidden else seen
    assert groups_module.is_folded(groups)
    out = groups_module.folded(partial, (q, k, v), groups)
    torch.testing.assert_close(out, reference(q, k, v, groups), atol=2e-6, rtol=1e-5)
    assert calls == [20]
    assert out.transpose(1, 2).is_contiguous()
    into = torch.zeros(batch, 9, 5, 2, 16)[:, :, 3].transpose(1, 2)
    assert groups_module.folded(partial, (q, k, v), groups, into) is into
    assert torch.equal(into, out)


@pytest.mark.parametrize(
    "groups",
    [
        (KeyGroup(20, 0.0),),
        (KeyGroup(2, math.log(512)), KeyGroup(18, 0.0)),
        (KeyGroup(1, math.log(0.5)), KeyGroup(19, 0.0)),
        (KeyGroup(1, math.log(512)), KeyGroup(19, 0.1)),
        (KeyGroup(1, math.log(512)), KeyGroup(3, -math.inf), KeyGroup(16, 0.0)),
        (KeyGroup(3, 0.0), KeyGroup(1, math.log(512)), KeyGroup(16, 0.0)),
    ],
    ids=str,
)
def test_other_groups_are_not_folded(groups):
    assert not groups_module.is_folded(groups)
