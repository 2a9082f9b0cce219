"""The benchmarks compare like with like, and say so where there is nothing to measure."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from redux_kernels.dispatch import REQUIRED_CAPABILITY

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
NAMES = sorted({path.stem for path in FOLDER.glob("bench_*.py")} - {"bench_all"})
CPU = torch.device("cpu")


@pytest.fixture
def benchmark(request, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("benchmark", NAMES, indirect=True)
def test_benchmark_compares_the_same_numbers(benchmark):
    for case in benchmark.cases(11, CPU):
        for each in case.written:
            each.view(torch.uint8).fill_(0x7F)  # NaN in e4m3
        returned = [each for each in tensors(case.call()) if each is not None]
        replaced = tensors(case.replaced())
        for ours, theirs in zip((*returned, *case.written), replaced, strict=True):
            if any(ours is each for each in case.written):
                theirs = theirs.flatten(0, 1)
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            error = (ours.float() - theirs.float()).abs()
            tolerance = 40 if ours.dtype == torch.float8_e4m3fn else 0.3
            assert error.max() <= tolerance
            assert error.mean() <= 0.02 * theirs.float().abs().mean()


@pytest.mark.parametrize("benchmark", NAMES, indirect=True)
def test_benchmark_refuses_to_run_without_a_gpu(benchmark, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="torch sees none: nothing was run"):
        benchmark.main("", benchmark.cases)


def test_every_operator_has_a_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    every = importlib.import_module("bench_all")
    assert {case.operator for case in every.cases(3, CPU)} == set(REQUIRED_CAPABILITY)
