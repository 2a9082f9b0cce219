"""The start-up test lets through what agrees with its reference, and nothing else."""

import pytest
import torch

from redux_kernels import adaln, dispatch, merge_lse, reference
from redux_kernels.self_test import self_test

CPU = torch.device("cpu")
MINI = {"heads": 4, "head_dim": 64}


@pytest.fixture
def believed(monkeypatch):
    """The CPU passes for a GPU: the verdict hangs on what ``launch`` computes."""
    monkeypatch.setattr(dispatch, "hardware_refusal", lambda operator, device: None)
    monkeypatch.setattr(dispatch, "_tested", {})


@pytest.fixture
def launches_reference(believed, monkeypatch):
    """``adaln.launch`` computes the reference."""

    def launch(x, scale, shift, eps, *, quantize):
        if quantize:
            return reference.adaln_quantize(x, scale, shift, eps)
        return reference.adaln(x, scale, shift, eps), x

    monkeypatch.setattr(adaln, "launch", launch)
    return launch


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_kernel_passes_in_the_interpreter(believed, dtype):
    verdicts = self_test("cpu", **MINI, dtype=dtype)
    assert set(verdicts) == set(dispatch.REQUIRED_CAPABILITY)
    assert set(verdicts.values()) == {None}
    assert dispatch.refusal("adaln", CPU) is None


@pytest.mark.gpu
def test_every_kernel_that_the_gpu_can_run_passes():
    verdicts = self_test("cuda")
    wanted = {name: dispatch.hardware_refusal(name, torch.device("cuda")) for name in verdicts}
    assert verdicts == wanted


def test_all_are_refused_on_a_cpu():
    assert set(self_test("cpu", **MINI).values()) == {"kernels run on CUDA devices, not on 'cpu'"}


@pytest.mark.parametrize("operator", ["adaln", "adaln_quantize"])
def test_right_numbers_pass(operator, launches_reference):
    assert self_test("cpu", **MINI)[operator] is None
    assert dispatch.refusal(operator, CPU) is None


@pytest.mark.parametrize("operator", ["adaln", "adaln_quantize"])
@pytest.mark.parametrize("wrong", [0.07, float("nan"), float("inf")])
def test_one_wrong_row_is_refused(operator, wrong, launches_reference, monkeypatch):
    def launch(*args, **kwargs):
        h, row_scale = launches_reference(*args, **kwargs)
        spoilt = h.float()
        spoilt[:, -1] = spoilt[:, -1] * (1 + wrong) + wrong
        return spoilt.to(h.dtype), row_scale

    monkeypatch.setattr(adaln, "launch", launch)
    reason = self_test("cpu", **MINI)[operator]
    assert reason is not None
    assert reason.startswith("differs from its reference by up to")
    assert dispatch.refusal(operator, CPU) == reason


def test_kernel_that_cannot_start_is_refused_with_its_error(believed, monkeypatch):
    def launch(*args):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(merge_lse, "launch", launch)
    assert self_test("cpu", **MINI)["merge_lse"] == "RuntimeError: out of registers"


def test_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    self_test("cpu", **MINI)
    assert torch.equal(before, torch.random.get_rng_state())
