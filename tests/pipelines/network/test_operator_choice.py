"""Which operators run on which device, and why not the others."""

import pytest
import torch

from redux_kernels import dispatch, self_test
from redux_pipelines import onednn
from redux_pipelines.network import operator_choice
from redux_pipelines.network.operator_choice import NEEDED, NEEDED_FOR_FP8

CPU = torch.device("cpu")


def choose(device="cuda", dtype=torch.bfloat16, **options):
    return operator_choice.choose(torch.device(device), dtype, num_heads=2, head_dim=16, **options)


NO_KERNELS = dict.fromkeys(NEEDED, "kernels run on CUDA devices, not on 'cpu'")


def test_a_cpu_runs_on_onednn_and_says_why_not_on_kernels(monkeypatch):
    monkeypatch.setattr(onednn, "refusal", lambda device, dtype: None)
    choice = choose("cpu", torch.float32)
    assert choice.operators.name == "onednn"
    assert choice.refusals == NO_KERNELS


@pytest.mark.parametrize(
    ("vendor", "heads", "name"),
    [("GenuineIntel", 8, "torch"), ("GenuineIntel", 7, "onednn"), ("AuthenticAMD", 24, "onednn")],
)
def test_on_intels_processors_wide_rows_are_left_to_mkl(vendor, heads, name, monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: made up\n")
    monkeypatch.setattr(onednn, "_CPU_INFO", info)
    monkeypatch.setattr(onednn, "refusal", lambda device, dtype: None)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    choice = operator_choice.choose(CPU, torch.float32, num_heads=heads, head_dim=128)
    assert choice.operators.name == name
    reason = "is slower than MKL on Intel's processors for rows of 1024"
    assert choice.refusals.get("onednn") == (reason if name == "torch" else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cpu_runs_plain_torch_in_other_dtypes(dtype):
    choice = choose("cpu", dtype)
    assert choice.operators.name == "torch"
    kind = str(dtype).removeprefix("torch.")
    assert choice.refusals == NO_KERNELS | {"onednn": f"does not take {kind}"}


def test_a_cpu_runs_plain_torch_if_onednn_is_refused(monkeypatch):
    monkeypatch.setattr(onednn, "refusal", lambda device, dtype: "is wrong")
    choice = choose("cpu", torch.float32)
    assert choice.operators.name == "torch"
    assert choice.refusals["onednn"] == "is wrong"


def test_a_cpu_runs_plain_torch_with_layers_in_fp8():
    choice = choose("cpu", torch.float32, fp8=True)
    assert choice.operators.name == "torch"
    assert choice.refusals["onednn"] == "does not take fp8"


@pytest.fixture
def _gpu(monkeypatch):
    """A machine whose GPU could run every kernel."""
    monkeypatch.setattr(dispatch, "hardware_refusal", lambda name, device: None)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("wrong", [(), ("gelu_into",), NEEDED])
def test_kernels_run_only_if_all_of_them_passed_their_test(monkeypatch, wrong):
    verdicts = {name: "differs" if name in wrong else None for name in self_test.TESTS}
    monkeypatch.setattr(operator_choice, "self_test", lambda *_, **__: verdicts)
    choice = choose()
    assert choice.operators.name == ("torch" if wrong else "kernels")
    assert choice.refusals == dict.fromkeys(wrong, "differs")


@pytest.mark.usefixtures("_gpu")
def test_kernels_that_are_not_needed_do_not_matter(monkeypatch):
    verdicts = {name: None if name in NEEDED else "differs" for name in self_test.TESTS}
    monkeypatch.setattr(operator_choice, "self_test", lambda *_, **__: verdicts)
    assert choose().operators.name == "kernels"


@pytest.mark.usefixtures("_gpu")
def test_with_fp8_the_kernels_that_quantize_are_needed_too(monkeypatch):
    verdicts = {name: "differs" if name == "gelu_quantize" else None for name in self_test.TESTS}
    monkeypatch.setattr(operator_choice, "self_test", lambda *_, **__: verdicts)
    assert choose().operators.name == "kernels"
    choice = choose(fp8=True)
    assert choice.operators.name == "torch"
    assert choice.refusals == {"gelu_quantize": "differs"}
    assert set(NEEDED_FOR_FP8) > set(NEEDED)


@pytest.mark.usefixtures("_gpu")
def test_float16_is_left_to_plain_torch_which_clips():
    choice = choose(dtype=torch.float16)
    assert choice.operators.name == "torch"
    assert "not float16" in choice.refusals["adaln"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_runs_the_kernels(dtype):
    choice = operator_choice.choose(torch.device("cuda"), dtype, num_heads=24, head_dim=128)
    assert choice.operators.name == "kernels", choice.refusals
