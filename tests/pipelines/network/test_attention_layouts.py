"""How rows reach attention: cuDNN builds a plan for every shape and stride that it has not met."""

import math

import pytest
import torch

from pipelines.networks import SCHEDULE, conditioning, diffusers_model, engine, noise
from redux_kernels import dispatch, merge_groups, reference
from redux_pipelines.attention.groups import Implementation, grouped
from redux_pipelines.conditioning.tokens import Conditioning, Tokens
from redux_pipelines.network.operators import KernelOperators
from redux_pipelines.sampling import Grid

FOLDED, STRENGTH = {"copies": 40}, 0.5


class Recorder:
    """A ``Partial`` in plain torch that notes shapes and strides, as cuDNN's plans are kept by."""

    def __init__(self):
        self.plans, self.calls = set(), 0

    def __call__(self, q, k, v):
        self.calls += 1
        self.plans.add(tuple((tuple(each.shape), each.stride()) for each in (q, k, v)))
        logits = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
        out = (logits.softmax(-1) @ v.float()).to(q.dtype)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return out, logits.logsumexp(-1, keepdim=True)


@pytest.fixture
def recorder(monkeypatch):
    """Groups are merged as on a GPU; the kernel's reference stands in for it."""
    monkeypatch.setattr(dispatch, "runs_kernel", lambda operator, x: operator == "merge_groups")
    monkeypatch.setattr(merge_groups, "launch", reference.merge_groups)
    return Recorder()


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("grid", [Grid(4, 6), Grid(5, 5)], ids=str)
@torch.inference_mode()
def test_a_size_needs_a_plan_for_all_blocks_and_one_for_the_last(recorder, strength, grid):
    """For each group of keys: its number of keys is another shape, as are the last block's rows."""
    model = diffusers_model()
    stub = Implementation("stub", grouped(recorder), ("cpu",), (torch.float32,), 16)
    denoiser = engine(model, attention=stub, operators=KernelOperators())
    given = conditioning(model, **FOLDED)
    redux = tuple(Tokens(each.values, log_weight=math.log(strength)) for each in given.redux)
    given = Conditioning(given.txt, redux, given.vec, given.guidance)
    prepared = denoiser.prepare(given, SCHEDULE, grid)
    prepared.predict(noise(model, grid), 1)
    groups = 1 if strength == 1.0 else 2
    assert recorder.calls == 5 * groups  # 2 double and 3 single blocks
    assert len(recorder.plans) == 2 * groups
    rows = {plan[0][0][2] for plan in recorder.plans}
    assert rows == {len(prepared.txt) + grid.tokens, grid.tokens}
