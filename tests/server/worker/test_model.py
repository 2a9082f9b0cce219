"""The model of a worker: what the pipeline is asked for, what is compiled before the first task."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

from redux_pipelines.contract.types import WARM_UP_SIZES, CompileReport
from redux_pipelines.fake import FakePipeline
from redux_pipelines.loading import load as load_module
from redux_server import metrics
from redux_server.settings import ServerSettings
from redux_server.worker import model
from redux_server.worker.model import cache_dir
from server.compiling import DONE, FAILED, loads


def test_the_memory_mode_and_the_batch_size_reach_the_pipeline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def load(**options: Any) -> FakePipeline:
        asked.update(options)
        return FakePipeline()

    monkeypatch.setattr(load_module, "load_pipeline", load)
    settings = ServerSettings(data_dir=tmp_path, memory="evict", max_batch_size=3)
    model.load_model(settings, "cuda:1")
    assert (asked["memory"], asked["max_batch_size"], asked["device"]) == ("evict", 3, "cuda:1")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_dir() is None


def load_worker(settings: ServerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_warm_up", lambda *_: None)
    model.load_model(settings, "cpu")


@pytest.mark.parametrize(("report", "failures"), [(DONE, 0), (FAILED, 1)], ids=["done", "failed"])
def test_a_worker_compiles_before_it_is_ready_and_runs_on_without(
    report: CompileReport,
    failures: int,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = loads(monkeypatch, report)
    settings = ServerSettings(data_dir=home, compile="full", cuda_graphs=2)
    before = metrics.COMPILE_FAILURES._value.get()
    with structlog.testing.capture_logs() as logs:
        load_worker(settings, monkeypatch)
    (plan,) = pipeline.plans
    assert (plan.mode, plan.cuda_graphs, plan.sizes) == ("full", 2, WARM_UP_SIZES)
    assert metrics.COMPILE_FAILURES._value.get() == before + failures
    assert metrics.COMPILED._value.get() == (report.mode == "full")
    warnings: list[Any] = [each for each in logs if each["log_level"] == "warning"]
    assert [each["reason"] for each in warnings] == list(report.failures)
    described = model.describe_model(pipeline, settings)
    assert described.endswith("not compiled: its log says why")  # a fake never is


def test_a_worker_that_is_not_asked_to_compiles_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = loads(monkeypatch, DONE)
    load_worker(ServerSettings(data_dir=home), monkeypatch)
    assert pipeline.plans == []
    assert "compiled" not in model.describe_model(pipeline, ServerSettings(data_dir=home))


def test_a_model_without_a_network_starts_without_torch():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from redux_server.settings import ServerSettings\n"
        "from redux_server.worker.model import load_model\n"
        "load_model(ServerSettings(model='fake'), 'cpu')\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
