"""Who runs what, and the reasons; no GPU is needed to be refused one."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from redux_kernels import dispatch
from redux_kernels.adaln import adaln
from redux_kernels.self_test import TESTS, self_test

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that only names itself; gives it a compute capability."""
    monkeypatch.setattr(dispatch, "_tested", {})
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-up GPU")

    def has(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return has


@pytest.mark.parametrize("operator", dispatch.REQUIRED_CAPABILITY)
def test_every_operator_is_refused_on_a_cpu_and_says_so(operator):
    assert dispatch.refusal(operator, "cpu") == "kernels run on CUDA devices, not on 'cpu'"


def test_every_operator_has_a_name_a_requirement_and_a_self_test():
    assert set(TESTS) == set(dispatch.REQUIRED_CAPABILITY)
    assert all(hasattr(torch.ops.redux, name) for name in TESTS)


def test_kernel_waits_for_its_self_test(gpu):
    gpu(9, 0)
    assert dispatch.refusal("adaln", "cuda") == "not self-tested on this device yet"
    dispatch.record("adaln", CUDA, None)
    assert dispatch.refusal("adaln", "cuda") is None
    assert dispatch.refusal("adaln", "cuda:0") is None
    assert dispatch.refusal("gelu_into", "cuda:0") == "not self-tested on this device yet"


def test_failed_self_test_is_the_reason(gpu):
    gpu(9, 0)
    dispatch.record("adaln", torch.device("cuda"), "differs")
    assert dispatch.refusal("adaln", CUDA) == "differs"


@pytest.mark.parametrize(
    ("capability", "plain", "e4m3"),
    [((7, 5), False, False), ((8, 6), True, False), ((8, 9), True, True), ((12, 0), True, True)],
)
def test_architecture_decides(gpu, capability, plain, e4m3):
    gpu(*capability)
    assert (dispatch.hardware_refusal("adaln", CUDA) is None) is plain
    assert (dispatch.hardware_refusal("adaln_quantize", CUDA) is None) is e4m3


def test_refusal_names_what_is_needed_and_what_there_is(gpu):
    gpu(8, 6)
    assert dispatch.refusal("gelu_quantize", CUDA) == (
        "e4m3 conversion needs compute capability 8.9, Made-up GPU has 8.6"
    )


def test_missing_triton_is_a_reason(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch.refusal("adaln", CUDA) == "triton is not installed"


def test_unknown_operator_is_an_error():
    with pytest.raises(KeyError):
        dispatch.refusal("adalm", "cpu")


def test_cpu_tensor_never_meets_a_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "_tested", {("adaln", torch.device("cpu")): None})
    assert not dispatch.runs_kernel("adaln", torch.zeros(1))


def test_operators_run_without_triton():
    code = """
import sys
from contextlib import nullcontext
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from redux_kernels import dispatch, self_test
from redux_kernels.adaln import adaln
print(adaln(torch.ones(1, 2, 16), torch.zeros(1, 16), torch.ones(1, 16)).unique().tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          cwd=ROOT, env={"PYTHONPATH": "kernels", "PATH": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[1.0]\n"


@pytest.mark.gpu
def test_operator_runs_its_kernel_on_a_gpu_after_the_self_test():
    verdicts = self_test("cuda")
    x, vector = torch.randn(1, 9, 3072, device="cuda"), torch.zeros(1, 3072, device="cuda")
    assert dispatch.runs_kernel("adaln", x) is (verdicts["adaln"] is None)
    torch.testing.assert_close(
        adaln(x, vector, vector), torch.nn.functional.layer_norm(x, (3072,), eps=1e-6)
    )


class OnGpu:
    """A tensor on the GPU with this number."""

    def __init__(self, index):
        self.index = index

    def get_device(self):
        return self.index


@pytest.mark.parametrize(("index", "entered"), [(-1, []), (0, []), (1, [1])])
def test_only_another_gpu_than_the_current_one_is_made_current(gpu, monkeypatch, index, entered):
    """Which costs as much as all else before a launch."""
    made = []
    monkeypatch.setattr(torch.cuda, "device", lambda number: made.append(number) or nullcontext())
    with dispatch.on_device_of(OnGpu(index)):
        assert made == entered
