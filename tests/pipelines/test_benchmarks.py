"""The benchmarks run from sources that are not installed, and keep what they have when cut off."""

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from redux_pipelines.fake import FakePipeline
from redux_server import __version__

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "pipelines" / "benchmarks", ROOT / "kernels" / "benchmarks"]


class Cut(Exception):
    """Stands for what ends a run before its end."""


@pytest.fixture
def bench(monkeypatch):
    """A module of the benchmarks by its name, freshly imported."""
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


def _once(result):
    """Gives ``result`` the first time, and is cut off the second time."""
    results = iter([result])

    def measure(*_args, **_kwargs):
        for each in results:
            return each
        raise Cut

    return measure


def _no_networks(*_):
    return None, None


CASE = {"network": "narrow", "size": 512, "prompt": "empty", "target": 1.0, "ratio_cpu": 0.5}
RUNS = {
    "bench_engine": (
        ["--cases", "narrow", "--threads", "1"],
        {"_case": _once(CASE), "_networks": _no_networks},
        lambda report: report["cases"] == [CASE] and report["targets"][0]["holds"],
    ),
    "bench_attention": (
        ["--device", "cpu", "--attention", "biased"],
        {"_measure": _once({"biased": {"ms": 1.0}})},
        lambda report: report["milliseconds"] == {"1754": {"biased": {"ms": 1.0}}},
    ),
    "bench_mini": (
        [],
        {"_in_a_process": _once({"load_s": 1.0})},
        lambda report: report["runs"] == {"diffusers float32": {"load_s": 1.0}},
    ),
    "bench_products": (
        ["--threads", "1", "--hidden", "16", "--rows", "8"],
        {"_measured": _once({"ratio": 0.5})},
        lambda report: report["cases"] == [{"ratio": 0.5}],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_cut_off_keeps_what_it_has(bench, name, tmp_path, monkeypatch):
    arguments, replaced, is_kept = RUNS[name]
    module, out = bench(name), tmp_path / "new" / "report.json"
    for function, stand_in in replaced.items():
        monkeypatch.setattr(module, function, stand_in)
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--out", str(out)])
    with pytest.raises(Cut):
        module.main()
    report = json.loads(out.read_text())
    assert is_kept(report), report
    assert report["environment"]["packages"]["torch"] == importlib.metadata.version("torch")
    assert [path.name for path in out.parent.iterdir()] == ["report.json"]


def test_points_of_growth_are_kept(bench, tmp_path, monkeypatch):
    module = bench("bench_growth")
    monkeypatch.setattr(module, "load_pipeline", lambda **_: FakePipeline())
    runs = iter([(1.0, 2.0)] * 4)  # of two points, and no more

    def run(*_):
        for each in runs:
            return each
        raise Cut

    monkeypatch.setattr(module, "_run", run)
    arguments = ["--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["growth", *arguments])
    with pytest.raises(Cut):
        module.main()
    points = json.loads((tmp_path / "growth.json").read_text())["points"]
    assert [(point["backend"], point["x"]) for point in points] == [
        ("engine", 512**2 / 1e6),
        ("diffusers", 512**2 / 1e6),
        ("engine", 768**2 / 1e6),
        ("diffusers", 768**2 / 1e6),
    ]


def test_kernels_that_were_timed_are_kept(bench, tmp_path, monkeypatch):
    module, out = bench("timing"), tmp_path / "new" / "kernels.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_environment", lambda _: {"gpu": "pretended"})
    monkeypatch.setattr(module, "self_test", lambda _: {"adaln": None})
    monkeypatch.setattr(module, "_measure", _once({"label": "first"}))
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(out)])
    case = module.Case("adaln", "", 1, lambda: None, lambda: None)
    with pytest.raises(Cut):
        module.main("", lambda rows, device: iter([case, case]))
    report = json.loads(out.read_text())
    assert report == {"environment": {"gpu": "pretended"}, "results": [{"label": "first"}]}


def test_what_is_not_installed_is_no_failure(bench, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    machine = bench("machine")
    monkeypatch.setattr(machine, "version", missing)
    packages = machine.environment()["packages"]
    assert packages.pop("flux-redux-server") == __version__
    assert set(packages.values()) == {"not installed"}


def test_a_copy_of_the_sources_need_not_be_installed(tmp_path):
    for name in ("pipelines/benchmarks/machine.py", "server/redux_server/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    own = tmp_path / "server/redux_server/__init__.py"
    own.write_text(own.read_text().replace(__version__, "9.8.7"))
    program = (
        "import importlib.metadata as metadata\n"
        "find = metadata.version\n"
        "def version(name):\n"
        "    if name.startswith('flux-redux'): raise metadata.PackageNotFoundError(name)\n"
        "    return find(name)\n"
        "metadata.version = version\n"
        "from machine import environment\n"
        "print(environment()['packages']['flux-redux-server'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(tmp_path / "pipelines/benchmarks")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "9.8.7\n"
