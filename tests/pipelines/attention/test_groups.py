"""Biases of keys, a folded key's copies, and where an implementation may run."""

import math

import pytest
import torch

from pipelines.attention_rows import qkv
from redux_kernels import dispatch, merge_groups
from redux_kernels import reference as kernels_reference
from redux_pipelines.attention import groups as groups_module
from redux_pipelines.attention.groups import Capabilities, KeyGroup, reference

CPU = torch.device("cpu")


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


def _plain(q, k, v):
    """A ``Partial`` in plain torch."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return logits.softmax(-1) @ v, logits.logsumexp(-1, keepdim=True)


ONE = KeyGroup(1, math.log(512))
HIDDEN = KeyGroup(6, -math.inf)
SEVERAL = {
    "two": (ONE, KeyGroup(19, 0.0)),
    "two after filling": (HIDDEN, ONE, KeyGroup(19, 0.0)),
    "three": (HIDDEN, KeyGroup(7, math.log(0.5)), ONE, KeyGroup(19, 0.0)),
    "three, one of weight 0": (KeyGroup(7, 0.3), KeyGroup(4, -math.inf), KeyGroup(19, 0.0)),
    "five": (*(KeyGroup(2 + i, math.log(0.3 + i)) for i in range(4)), KeyGroup(19, 0.0)),
    "six": (HIDDEN, *(KeyGroup(2 + i, i - 2.0) for i in range(4)), ONE, KeyGroup(19, 0.0)),
    "more than one call takes": (*(KeyGroup(2, i - 3.0) for i in range(11)), ONE),
    "more single keys than one call takes": (*(KeyGroup(1, i - 1.0) for i in range(4)),),
    "single keys": (ONE, KeyGroup(1, 0.0)),
    "one": (HIDDEN, KeyGroup(19, 0.0)),
    "one that has a bias": (KeyGroup(19, 2.0),),
}
CALLS = {"two": 1, "three": 2, "five": 5, "six": 5, "more than one call takes": 11, "one": 1}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The kernel is believed to run, and its reference stands in for it."""
    monkeypatch.setattr(dispatch, "runs_kernel", lambda operator, x: operator == "merge_groups")
    monkeypatch.setattr(merge_groups, "launch", kernels_reference.merge_groups)


class Counted:
    """A ``Partial`` in plain torch that counts the keys of its calls; rows come before heads."""

    def __init__(self):
        self.keys = []

    def __call__(self, q, k, v):
        self.keys.append(k.shape[2])
        out, lse = _plain(q, k, v)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SEVERAL)
def test_groups_are_merged_at_once_where_a_kernel_does_it(name, batch):
    groups, partial = SEVERAL[name], Counted()
    rows = sum(each.rows for each in groups)
    q, k, v = qkv(rows, queries := min(rows, 5), batch=batch, dtype=torch.float32)
    attend = groups_module.grouped(partial)
    out = attend(q, k, v, groups)
    exact = reference(q.double(), k.double(), v.double(), groups)
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=1e-5)
    assert out.transpose(1, 2).is_contiguous()
    assert len(partial.keys) == CALLS.get(name, len(partial.keys))
    wide = torch.full((batch, queries, 5 * 32), math.nan)
    into = wide[..., 32:64].unflatten(-1, (2, 16)).transpose(1, 2)
    assert attend(q, k, v, groups, into) is into
    assert torch.equal(into, out)
    assert wide[..., :32].isnan().all()
    assert wide[..., 64:].isnan().all()


@pytest.mark.parametrize("name", SEVERAL)
def test_plain_torch_merges_the_same_groups(name):
    groups = SEVERAL[name]
    rows = sum(each.rows for each in groups)
    q, k, v = qkv(rows, min(rows, 5), dtype=torch.float64)
    out = groups_module.grouped(_plain)(q, k, v, groups)
    torch.testing.assert_close(out, reference(q, k, v, groups), atol=1e-12, rtol=0)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_more_results_are_held_at_once_than_one_call_takes(monkeypatch):
    given = []

    def launch(outs, *others):
        given.append(len(outs))
        kernels_reference.merge_groups(outs, *others)

    monkeypatch.setattr(merge_groups, "launch", launch)
    groups = SEVERAL["more than one call takes"]
    groups_module.grouped(Counted())(*qkv(23, 5, dtype=torch.float32), groups)
    assert given == [5, 5, 3]  # all but the first with what was merged before


@pytest.mark.usefixtures("as_on_a_gpu")
def test_compiled_code_merges_them_too():
    groups = SEVERAL["three"]
    q, k, v = qkv(33, 5, dtype=torch.float32)
    attend = groups_module.grouped(_plain)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v, groups), attend(q, k, v, groups))
    torch._dynamo.reset()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", SEVERAL)
def test_log_sum_exps_of_padded_rows_are_merged(name):
    """As torch's memory-efficient attention gives them: a part of wider rows."""

    def partial(q, k, v):
        out, lse = _plain(q, k, v)
        padded = torch.nn.functional.pad(lse.squeeze(-1), (0, 11))
        return out, padded[..., : q.shape[2], None]

    groups = SEVERAL[name]
    rows = sum(each.rows for each in groups)
    q, k, v = qkv(rows, min(rows, 5), dtype=torch.float32)
    out = groups_module.grouped(partial)(q, k, v, groups)
    exact = reference(q.double(), k.double(), v.double(), groups)
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=1e-5)
