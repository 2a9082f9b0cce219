"""Every implementation is one softmax over all keys with their biases; so are blocks of keys."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.attention_rows import qkv
from redux_pipelines.attention import backends
from redux_pipelines.attention.backends import IMPLEMENTATIONS, attend_in_blocks
from redux_pipelines.attention.choice import refusal
from redux_pipelines.attention.groups import KeyGroup, reference

CPU = torch.device("cpu")
ON_CPU = [each for each in IMPLEMENTATIONS if "cpu" in each.devices]
NAMES_ON_CPU = [each.name for each in ON_CPU]
ON_GPU = [each for each in IMPLEMENTATIONS if "cuda" in each.devices]


def _exact(attend):
    """The most precise dtype it takes, and how near to the truth that is."""
    takes_double = torch.float64 in getattr(attend, "dtypes", (torch.float64,))
    return (torch.float64, 1e-12) if takes_double else (torch.float32, 1e-5)


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
    q, k, v = qkv(rows, min(queries, rows), seed=seed, dtype=dtype)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    bias = torch.cat([torch.full((group.rows,), group.bias, dtype=q.dtype) for group in groups])
    expected = (logits + bias).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, tuple(groups)), expected, rtol=0, atol=atol)
    torch.testing.assert_close(reference(q, k, v, tuple(groups)), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("attend", [*ON_CPU, reference], ids=[*NAMES_ON_CPU, "reference"])
def test_n_equal_keys_are_one_with_the_logarithm_of_n(attend):
    dtype, atol = _exact(attend)
    q, k, v = qkv(20, dtype=dtype)
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
    q, k, v = qkv(12, 7, batch=2, dtype=torch.float32)
    wide = torch.full((2, 7, 5 * 32), math.nan)
    into = wide[..., 32:64].unflatten(-1, (2, 16)).transpose(1, 2)
    assert attend(q, k, v, groups, into) is into
    assert torch.equal(into, attend(q, k, v, groups))
    assert wide[..., :32].isnan().all()
    assert wide[..., 64:].isnan().all()


@pytest.mark.parametrize("attend", ON_CPU, ids=lambda each: each.name)
def test_unseen_keys_may_hold_anything(attend):
    dtype, atol = _exact(attend)
    q, k, v = qkv(20, 8, dtype=dtype)
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
    q, k, v = qkv(40, dtype=torch.bfloat16)
    groups = (KeyGroup(1, math.log(512)), KeyGroup(39, 0.0))
    exact = reference(q.double(), k.double(), v.double(), groups)
    assert (attend(q, k, v, groups).double() - exact).norm() / exact.norm() < 5e-3


@pytest.mark.parametrize("attend", ON_CPU, ids=lambda each: each.name)
def test_many_rows_merge_to_one_plain_softmax_in_float32(attend):
    """More keys than any kernel's tile."""
    groups = (KeyGroup(3, -math.inf), KeyGroup(1, math.log(512)), KeyGroup(300, -1.0))
    groups = (*groups, KeyGroup(701, 0.0))
    q, k, v = qkv(1005, 90, width=64, batch=2, dtype=torch.float32)
    exact = reference(q.double(), k.double(), v.double(), groups)
    torch.testing.assert_close(attend(q, k, v, groups).double(), exact, rtol=0, atol=1e-5)


def test_few_keys_are_left_to_one_call_of_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(backends, "attend_in_blocks", lambda *given: calls.append(given))
    (onednn,) = (each for each in ON_CPU if each.name == "onednn")
    for rows in (backends.FEW_KEYS - 1, backends.FEW_KEYS):
        q, k, v = qkv(rows, 3, dtype=torch.float32)
        onednn(q, k, v, (KeyGroup(rows, 0.0),))
    assert [given[1].shape[2] for given in calls] == [backends.FEW_KEYS]


def test_our_kernels_reference_is_one_plain_softmax():
    """What the operator computes where its kernel may not run."""
    groups = (KeyGroup(3, -math.inf), KeyGroup(1, math.log(512)), KeyGroup(30, -1.0))
    q, k, v = qkv(34, 9, dtype=torch.float32)
    exact = reference(q.double(), k.double(), v.double(), groups)
    got = backends.triton(q, k, v, groups)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
    assert got.transpose(1, 2).is_contiguous()


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
    q, k, v = (x.cuda() for x in qkv(4832, 300, width=128, batch=2, dtype=torch.bfloat16))
    exact = reference(q.float(), k.float(), v.float(), groups)
    assert (attend(q, k, v, groups).float() - exact).norm() / exact.norm() < 1e-2


# --- attention by blocks --------------------------------------------------------------------------


def exact(q, k, v, groups):
    return reference(q.double(), k.double(), v.double(), groups)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(backends, "_QUERIES", 4)
    monkeypatch.setattr(backends, "_KEYS", 8)


@pytest.fixture
def weighed(monkeypatch):
    """Which of the two ways blocks were weighed in."""
    seen = set()
    for name in ("_weigh", "_weigh_by_maximum"):
        own = getattr(backends, name)

        def spy(*given, name=name, own=own):
            seen.add(name)
            own(*given)

        monkeypatch.setattr(backends, name, spy)
    return seen


@pytest.mark.usefixtures("small_blocks")
@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    hidden=st.integers(0, 20),
    folded=st.booleans(),
    queries=st.integers(1, 20),
    size=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_any_rows_in_any_blocks_are_one_softmax(rows, hidden, folded, queries, size, seed):
    """Whole blocks of keys may be hidden; logits go to ±10⁵, where a row sees one key alone."""
    groups = (KeyGroup(hidden, -math.inf), KeyGroup(1, 6.24), KeyGroup(rows, 0.0))
    groups = groups if hidden else groups[1:]
    groups = groups if folded else (KeyGroup(1 + rows + hidden, 0.0),)
    total = 1 + rows + hidden
    q, k, v = qkv(total, min(queries, total), size=size, seed=seed)
    expected = exact(q, k, v, groups)
    # a logit's own rounding is all that may show: its weight is off by that much
    rounding = 4e-7 * float((q.abs() @ k.abs().mT).max()) / math.sqrt(q.shape[-1])
    torch.testing.assert_close(
        attend_in_blocks(q, k, v, groups).double(), expected, rtol=0, atol=1e-5 + 8 * rounding
    )


@pytest.mark.parametrize(
    ("size", "bias", "way"),
    [
        (1.0, 0.0, "_weigh"),
        (1.0, math.log(512), "_weigh"),
        (1.0, -60.0, "_weigh_by_maximum"),
        (9.0, 0.0, "_weigh_by_maximum"),
        (math.nan, 0.0, "_weigh_by_maximum"),
    ],
)
def test_powers_are_taken_as_they_are_only_where_none_can_overflow(size, bias, way, weighed):
    groups = (KeyGroup(3, -math.inf), KeyGroup(1, bias), KeyGroup(20, 0.0))
    q, k, v = qkv(24, 6, size=size)
    out = attend_in_blocks(q, k, v, groups)
    assert weighed == {way}
    assert bool(out.isnan().all()) is math.isnan(size)


def test_both_ways_agree_at_their_border(monkeypatch):
    q, k, v = qkv(1500, 1100, width=64)
    groups = (KeyGroup(1, math.log(512)), KeyGroup(1499, 0.0))
    outs = []
    for safe in (-1.0, 1e9):
        monkeypatch.setattr(backends, "_SAFE", safe)
        outs.append(attend_in_blocks(q, k, v, groups))
        expected = exact(q, k, v, groups)
        assert (outs[-1] - expected).norm() <= 2e-6 * expected.norm()
    assert not torch.equal(*outs)


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_all_that_is_held_is_a_block(size):
    """Every tensor made on the way is smaller than a head's logits by far."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    rows = 3000
    q, k, v = qkv(rows, rows, heads=1)
    with Watch():
        attend_in_blocks(q, k, v, (KeyGroup(rows, 0.0),))
    block = backends._QUERIES * torch.get_num_threads() * backends._KEYS
    assert largest <= max(block, q.numel())
    assert largest < rows * rows / 4


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_lie_before_heads_and_inputs_stay(batch):
    q, k, v = qkv(20, 7, batch=batch)
    before = [each.clone() for each in (q, k, v)]
    out = attend_in_blocks(q, k, v, (KeyGroup(20, 0.0),))
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()
    assert all(map(torch.equal, before, (q, k, v)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [1.0, 40.0])
def test_a_result_by_blocks_is_written_where_it_is_wanted(size):
    q, k, v = qkv(30, 11, batch=2, size=size)
    groups = (KeyGroup(9, -math.inf), KeyGroup(21, 0.0))
    wide = torch.full((2, 11, 5 * 32), math.nan)
    into = wide[..., 32:64].unflatten(-1, (2, 16)).transpose(1, 2)
    assert attend_in_blocks(q, k, v, groups, into) is into
    assert torch.equal(into, attend_in_blocks(q, k, v, groups))
    assert wide[..., :32].isnan().all()
    assert wide[..., 64:].isnan().all()
