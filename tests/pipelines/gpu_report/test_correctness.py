"""The report's own view of tests and errors: what ended how, and what counts as wrong."""

import pytest
import torch
from gpu_report import correctness
from gpu_report.paths import ROOT
from gpu_report.runner import NotRun
from gpu_report.scale import FULL, SMALL
from gpu_report.subject import Subject

from fp8_products import REFUSAL
from redux_pipelines.attention import backends

CPU = torch.device("cpu")

ALONE = """\
tests/kernels/test_adaln.py::test_one[gpu] PASSED                    [ 20%]
tests/kernels/test_adaln.py::test_two[a b] PASSED                    [ 40%]
tests/kernels/test_adaln.py::test_three SKIPPED (no CUDA device)     [ 60%]
tests/kernels/test_adaln.py::test_four FAILED                        [ 80%]
tests/kernels/test_adaln.py::test_five
FAILED tests/kernels/test_adaln.py::test_four - AssertionError
ERROR tests/pipelines/test_x.py - ModuleNotFoundError
"""
TOGETHER = """\
[gw1] [  0%] PASSED tests/kernels/test_adaln.py::test_one[gpu]
tests/kernels/test_adaln.py::test_two[gpu]
[gw0] [ 10%] FAILED tests/kernels/test_adaln.py::test_two[gpu]
[gw0] [100%] SKIPPED tests/kernels/test_adaln.py::test_three
"""


def test_outcomes_are_read_from_what_pytest_printed_so_far():
    found = correctness.outcomes(ALONE)
    assert (found["passed"], found["skipped"], found["failed_count"]) == (2, 1, 2)
    assert found["failed"] == [
        "tests/kernels/test_adaln.py::test_four",
        "tests/pipelines/test_x.py",
    ]
    found = correctness.outcomes(TOGETHER)
    assert (found["passed"], found["skipped"]) == (1, 1)
    assert found["failed"] == ["tests/kernels/test_adaln.py::test_two[gpu]"]


def test_tests_that_do_not_end_in_time_are_a_failure_that_says_so(tmp_path):
    section = {}
    with pytest.raises(RuntimeError, match="did not end in time"):
        correctness.gpu_tests(SMALL, section, 0.2, tmp_path / "log")
    assert section["exit_code"] == correctness.STOPPED
    assert section["passed"] == 0


def test_without_pytest_tests_are_not_run_and_that_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(correctness, "find_spec", lambda _: None)
    with pytest.raises(NotRun, match="pytest is not installed"):
        correctness.gpu_tests(SMALL, {}, 10, tmp_path / "log")


def test_tests_that_need_what_is_not_here_are_not_run(tmp_path, monkeypatch):
    def pytest_without(_scale, _limit_s, log):
        log.write_text("ModuleNotFoundError: No module named 'sqlalchemy'\n")
        return 4

    monkeypatch.setattr(correctness, "_pytest", pytest_without)
    with pytest.raises(NotRun, match="the tests need sqlalchemy, which is not installed"):
        correctness.gpu_tests(SMALL, {}, 10, tmp_path / "log")


def test_all_files_with_gpu_tests_are_run_but_the_full_size_ones():
    files = correctness.test_files(FULL)
    assert "tests/kernels/test_qk_norm_rope.py" in files
    assert "tests/pipelines/compilation/test_cuda_graphs.py" in files
    assert correctness.FULL_SIZE_TESTS not in files
    assert (ROOT / correctness.FULL_SIZE_TESTS).is_file()
    assert "tests/pipelines/loading/test_load.py" not in files


def test_a_wrong_attention_is_a_failure_and_the_others_are_told(monkeypatch):
    def wrong(q, k, v, groups, into=None):
        out = backends.biased(q, k, v, groups, into)
        return out.mul_(1.1)

    bad = backends.Implementation("bad", wrong, ("cpu",), (torch.float32,))
    monkeypatch.setattr(correctness, "IMPLEMENTATIONS", (bad, *backends.IMPLEMENTATIONS))
    section = {}
    with pytest.raises(RuntimeError, match="wrong on this device: bad"):
        correctness.operators(Subject(SMALL, CPU, torch.float32), section)
    assert section["attention"]["bad"]["refused"].startswith("is wrong")
    assert section["attention"]["biased"]["worst_query_error"] < 1e-5


def test_half_precision_is_further_from_float32_than_float32_is():
    section = {}
    correctness.blocks(Subject(SMALL, CPU, torch.bfloat16), section)
    errors = section["errors"]
    assert errors["engine float32"] < 1e-5
    assert all(1e-3 < errors[name] < 5e-2 for name in ("diffusers", "engine plain", "engine"))
    assert errors["engine"] < 2 * errors["diffusers"]
    assert REFUSAL is not None or errors["engine fp8"] > errors["engine"]
