"""The start-up test lets through what agrees with its reference, and nothing else."""

import pytest
import torch

from kernels.right_launches import KERNELS
from redux_kernels import adaln, dispatch, merge_groups
from redux_kernels.self_test import TESTS, new_memory_is_nan, self_test
from stand_ins import NOT_COMPUTING, fixing

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

    launch = KERNELS["adaln_quantize"].launch.compute
    monkeypatch.setattr(adaln, "launch", launch)
    return launch


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
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
    def launch(*args):
        h = launches_reference(*args)
        spoilt = h.float()
        spoilt[..., -1, :] = spoilt[..., -1, :] * (1 + wrong) + wrong
        return h.copy_(spoilt)

    monkeypatch.setattr(adaln, "launch", launch)
    reason = self_test("cpu", **MINI)[operator]
    assert reason is not None
    assert reason.startswith("differs from its reference by up to")
    assert dispatch.refusal(operator, CPU) == reason


def test_kernel_that_cannot_start_is_refused_with_its_error(believed, monkeypatch):
    def launch(*args):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(merge_groups, "launch", launch)
    assert self_test("cpu", **MINI)["merge_groups"] == "RuntimeError: out of registers"


ARGUMENTS = [
    (operator, argument)
    for operator, kernel in KERNELS.items()
    for argument in kernel.launch.arguments
    if argument not in kernel.launch.written
]


def verdict(operator, launch, monkeypatch, dtype=torch.bfloat16):
    kernel = KERNELS[operator]
    monkeypatch.setattr(kernel.module, kernel.name, launch)
    return self_test("cpu", **MINI, dtype=dtype, operators=(operator,))[operator]


@pytest.mark.parametrize("operator", TESTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_the_reference_computes_passes(operator, dtype, believed, monkeypatch):
    assert verdict(operator, KERNELS[operator].launch.compute, monkeypatch, dtype) is None


@pytest.mark.parametrize("operator", TESTS)
@pytest.mark.parametrize("change", NOT_COMPUTING.values(), ids=NOT_COMPUTING)
def test_a_kernel_that_does_not_compute_is_refused(operator, change, believed, monkeypatch):
    assert verdict(operator, change(KERNELS[operator].launch), monkeypatch) is not None


@pytest.mark.parametrize(("operator", "argument"), ARGUMENTS)
def test_a_kernel_that_ignores_an_argument_is_refused(operator, argument, believed, monkeypatch):
    """It computes with the first one that it was given."""
    assert verdict(operator, fixing(argument, KERNELS[operator].launch), monkeypatch) is not None


@pytest.mark.parametrize("wrong", [1e30, float("inf"), float("nan")])
def test_scales_of_rows_do_not_say_how_wrong_rows_may_be(wrong, believed, monkeypatch):
    """Rows of zeros are within half a step of e4m3 of anything, if that step is large."""

    def launch(x, q, row_scale):
        q.zero_()
        row_scale.fill_(wrong)

    assert verdict("quantize_rows", launch, monkeypatch) is not None


def test_torchs_deterministic_mode_is_as_before():
    fill = torch.utils.deterministic
    with pytest.raises(RuntimeError, match="out of registers"), new_memory_is_nan():
        assert torch.empty(3).isnan().all()
        raise RuntimeError("out of registers")
    assert torch.get_deterministic_debug_mode() == 0
    assert fill.fill_uninitialized_memory


def test_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    self_test("cpu", **MINI)
    assert torch.equal(before, torch.random.get_rng_state())
