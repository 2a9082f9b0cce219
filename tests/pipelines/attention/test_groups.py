"""Biases of keys, a folded key's copies, and where an implementation may run."""

import math

import pytest
import torch

from pipelines.attention_rows import qkv
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


@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_folded_key_gets_its_copies_after_one_call(hidden, batch):
    calls = []

    def partial(q, k, v):
        calls.append(k.shape[2])
        return _plain(q, k, v)

    q, k, v = qkv(20 + hidden, 9, batch=batch, dtype=torch.float32)
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
