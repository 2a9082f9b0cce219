"""Benchmarks measure what the pipeline really does."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from redux_kernels import dispatch
from redux_kernels.adaln import _adaln_kernel
from redux_pipelines.attention.groups import KeyGroup

FOLDER = Path(__file__).resolve().parents[2] / "pipelines" / "benchmarks"


@pytest.fixture
def benchmark(request, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


@pytest.mark.parametrize("benchmark", ["bench_attention"], indirect=True)
def test_attention_is_timed_over_the_groups_that_requests_have(benchmark):
    """A folded key comes right before the largest group, after a picture that is weighed."""
    half = KeyGroup(729, math.log(0.5))
    one, hidden = KeyGroup(1, math.log(512)), KeyGroup(6, -math.inf)
    assert benchmark.groups_of(4826, 16, 0.5) == (hidden, half, one, KeyGroup(4096, 0.0))
    assert benchmark.groups_of(4826, 16, 1.0) == (hidden, one, KeyGroup(4825, 0.0))
    assert benchmark.groups_of(1754, 1, 2.0)[0] == KeyGroup(729, math.log(2.0))


@pytest.mark.parametrize("benchmark", ["bench_attention"], indirect=True)
def test_attention_is_timed_on_rows_as_a_block_has_them(benchmark):
    groups = benchmark.groups_of(740, 16, 0.5)
    q, k, v, given = benchmark._inputs(groups, torch.device("cpu"), torch.float32)
    assert given == groups
    assert q.shape == k.shape == v.shape == (1, 24, 752, 128)
    assert q.stride() == k.stride() == v.stride()
    assert q.stride(2) == 7 * 24 * 128


@pytest.mark.parametrize("benchmark", ["bench_host"], indirect=True)
def test_the_hosts_side_is_measured_with_nothing_behind_it(benchmark, monkeypatch, tmp_path):
    small = replace(benchmark.PARAMS, depth=1, depth_single_blocks=2)
    monkeypatch.setattr(benchmark, "PARAMS", small)
    monkeypatch.setattr(sys, "argv", ["bench", "--repeats", "1", "--out", str(tmp_path / "a.json")])
    product = torch.nn.functional.linear
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["environment"]["threads"] == 1
    figures = report["milliseconds of processor time per step"]
    assert set(figures) == {f"{kind}, strength {s}{launches}" for kind in ("bfloat16", "fp8")
                            for s in ("1", "0.5")
                            for launches in ("", ", without launches")}  # fmt: skip
    assert report["seconds of 20 million additions"] > 0
    assert all(0 < each["least"] <= each["median"] for each in figures.values())
    assert torch.nn.functional.linear is product
    assert not dispatch.runs_kernel("adaln", torch.zeros(1))


@pytest.mark.parametrize("benchmark", ["bench_host"], indirect=True)
def test_no_kernel_is_launched_for_the_hosts_side(benchmark):
    """All are found, by their names."""
    from redux_kernels import adaln

    found = {name for _, name in benchmark._kernels()}
    assert {"_adaln_kernel", "_merge_groups_kernel", "_qk_norm_rope_kernel"} <= found
    with benchmark.nothing_behind():
        assert adaln._adaln_kernel is not _adaln_kernel
    assert adaln._adaln_kernel is _adaln_kernel


@pytest.mark.parametrize("benchmark", ["bench_host"], indirect=True)
@pytest.mark.parametrize("layers", ["bfloat16", "fp8"])
@torch.inference_mode()
def test_no_launch_is_prepared_where_launches_are_left_out(benchmark, layers, monkeypatch):
    """What stands in for one takes the same memory: shapes and dtypes are right."""
    launches = []

    def count(grid):
        launches.append(grid)
        return lambda *_arguments, **_options: None

    monkeypatch.setattr(benchmark._NoKernel, "__getitem__", lambda _, grid: count(grid))
    small = replace(benchmark.PARAMS, depth=1, depth_single_blocks=2)
    step = next(step for name, step in benchmark._steps(small) if name.startswith(layers))
    outs = []
    for stubs in (benchmark.nothing_behind, benchmark.no_launches):
        launches.clear()
        with stubs():
            outs.append(step())
        assert bool(launches) == (stubs is benchmark.nothing_behind)
    assert outs[0].shape == outs[1].shape
    assert outs[0].dtype == outs[1].dtype
