"""Attention by blocks is one softmax, whatever the blocks' borders and the logits' size."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redux_pipelines.attention import backends
from redux_pipelines.attention.backends import attend_in_blocks
from redux_pipelines.attention.groups import KeyGroup, reference


def qkv(rows, queries, *, heads=2, width=16, batch=1, size=1.0, seed=0):
    """Rows as a single block's projection has them: heads beside each other."""
    generator = torch.Generator().manual_seed(seed)
    together = torch.randn(batch, rows, 3, heads, width, generator=generator)
    q, k, v = (each.transpose(1, 2) for each in together.unbind(2))
    return q[:, :, -queries:] * size, k, v


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
def test_result_is_written_where_it_is_wanted(size):
    q, k, v = qkv(30, 11, batch=2, size=size)
    groups = (KeyGroup(9, -math.inf), KeyGroup(21, 0.0))
    wide = torch.full((2, 11, 5 * 32), math.nan)
    into = wide[..., 32:64].unflatten(-1, (2, 16)).transpose(1, 2)
    assert attend_in_blocks(q, k, v, groups, into) is into
    assert torch.equal(into, attend_in_blocks(q, k, v, groups))
    assert wide[..., :32].isnan().all()
    assert wide[..., 64:].isnan().all()
