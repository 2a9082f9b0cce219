"""The model of a worker: what the pipeline is asked for, what is compiled before the first task."""

import subprocess
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from redux_pipelines.contract.types import (
    CompileReport,
    GenerationRequest,
    ModelInfo,
    Progress,
    Result,
)
from redux_pipelines.errors import DeviceError, DeviceMemoryError, RequestError
from redux_pipelines.fake import FakePipeline
from redux_pipelines.loading import load as load_module
from redux_server import metrics
from redux_server.settings import ServerSettings, UsageError
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
    monkeypatch.setattr("redux_pipelines.devices.grow_segments", lambda _: False)
    settings = ServerSettings(data_dir=tmp_path, memory="evict", max_batch_size=3)
    model.load_model(settings, "cuda:1")
    assert (asked["memory"], asked["max_batch_size"], asked["device"]) == ("evict", 3, "cuda:1")


def test_several_gpus_of_an_image_reach_the_pipeline_and_are_described(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    class Four(FakePipeline):
        @property
        def info(self) -> ModelInfo:
            return replace(super().info, device="cuda:4", parallel=4)

    def load(**options: Any) -> FakePipeline:
        asked.update(options)
        return Four()

    monkeypatch.setattr(load_module, "load_pipeline", load)
    settings = ServerSettings(data_dir=tmp_path, parallel=4)
    pipeline, _ = model.load_model(settings, "cuda:4,cuda:5,cuda:6,cuda:7")
    assert (asked["parallel"], asked["device"]) == (4, "cuda:4,cuda:5,cuda:6,cuda:7")
    described = model.describe_model(pipeline, settings)
    assert described.endswith("on cuda:4 and 3 more for each image")


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
    monkeypatch.setattr(model, "_warm_up", lambda *_: ())
    model.load_model(settings, "cpu")


class Recording(FakePipeline):
    """On a device of its own; remembers the sizes of its images, fails at those it is told to."""

    def __init__(self, device: str = "cpu", failures: dict[int, Exception] | None = None) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int, int]] = []
        self._device = device
        self._failures = failures or {}

    @property
    def info(self) -> ModelInfo:
        return replace(super().info, device=self._device)

    def generate(self, request: GenerationRequest) -> Generator[Progress | Result, None, None]:
        self.sizes.append((request.width, request.height, request.num_inference_steps))
        if request.width in self._failures:
            raise self._failures[request.width]
        return super().generate(request)


def warmed(
    pipeline: Recording, monkeypatch: pytest.MonkeyPatch, settings: ServerSettings
) -> list[tuple[int, int, int]]:
    monkeypatch.setattr(load_module, "load_pipeline", lambda **_: pipeline)
    model.load_model(settings, "cpu")
    return pipeline.sizes


@pytest.mark.parametrize(
    ("device", "asked", "sizes"),
    [
        ("cpu", "", [(512, 512, 1)]),
        ("cuda:0", "", [(1024, 1024, 1)]),
        ("cpu", "768x1024", [(768, 1024, 1)]),
        ("cuda:0", "512x512,1024*768,512*512", [(512, 512, 1), (1024, 768, 1)]),
    ],
)
def test_a_worker_makes_an_image_of_each_size_before_it_is_ready(
    device: str, asked: str, sizes: list[Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServerSettings(data_dir=home, warm_sizes=asked, cuda_graphs="0")
    assert warmed(Recording(device), monkeypatch, settings) == sizes


@pytest.mark.parametrize("error", [RequestError("no room"), DeviceMemoryError("no room")])
def test_a_size_without_room_is_passed_over(
    error: Exception, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServerSettings(data_dir=home, warm_sizes="1536x1536,512x512")
    with structlog.testing.capture_logs() as logs:
        sizes = warmed(Recording(failures={1536: error}), monkeypatch, settings)
    assert [width for width, *_ in sizes] == [1536, 512]
    (warning,) = [each for each in logs if each["log_level"] == "warning"]
    assert (warning["size"], warning["reason"]) == ("1536x1536", "no room")


def test_a_device_that_fails_is_not_passed_over(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Recording(failures={512: DeviceError("gone")})
    with pytest.raises(DeviceError, match="gone"):
        warmed(pipeline, monkeypatch, ServerSettings(data_dir=home))


@pytest.mark.parametrize("asked", ["511x512", "1024x1537", "512x512,9x9"])
def test_sizes_that_cannot_be_generated_are_refused(asked: str, tmp_path: Path) -> None:
    allowed = r"--warm-sizes must be sizes separated by commas, each .* from 512 to 1536"
    with pytest.raises(UsageError, match=allowed):
        model.check_warm_up(ServerSettings(data_dir=tmp_path, warm_sizes=asked))


GPU = ModelInfo("flux-dev", "engine", "cuda:0", "bfloat16", 16)


@pytest.mark.parametrize(
    ("info", "settings", "is_compiled"),
    [
        (GPU, {}, True),
        (GPU, {"cuda_graphs": "0"}, False),
        (GPU, {"cuda_graphs": "0", "compile": "full"}, True),
        (GPU, {"backend": "diffusers"}, False),
        (replace(GPU, device="cpu"), {}, False),
        (replace(GPU, device="cpu"), {"cuda_graphs": "2"}, True),
    ],
)
def test_cuda_graphs_are_there_by_default_on_a_gpu_only(
    info: ModelInfo, settings: dict[str, Any], is_compiled: bool, tmp_path: Path
) -> None:
    chosen = ServerSettings(data_dir=tmp_path, **settings)
    assert model.is_compiled(chosen, info) == is_compiled
    model.check_warm_up(chosen)  # what is there by default contradicts nothing


@pytest.mark.parametrize(("report", "failures"), [(DONE, 0), (FAILED, 1)], ids=["done", "failed"])
def test_a_worker_compiles_before_it_is_ready_and_runs_on_without(
    report: CompileReport,
    failures: int,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = loads(monkeypatch, report)
    settings = ServerSettings(
        data_dir=home, compile="full", cuda_graphs="2", warm_sizes="512x768,512x512"
    )
    before = metrics.COMPILE_FAILURES._value.get()
    with structlog.testing.capture_logs() as logs:
        load_worker(settings, monkeypatch)
    (plan,) = pipeline.plans
    assert (plan.mode, plan.cuda_graphs, plan.sizes) == ("full", 2, ((512, 768), (512, 512)))
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


def test_a_model_without_a_network_starts_without_torch() -> None:
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from redux_server.settings import ServerSettings\n"
        "from redux_server.worker.model import load_model\n"
        "load_model(ServerSettings(model='fake'), 'cpu')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("device", "more", "grows"),
    [
        ("cuda:1", {"model": "mini"}, ["cuda:1"]),
        ("cuda:1", {"model": "mini", "parallel": 2}, []),
        ("cuda:1", {"model": "fake"}, []),
        ("cpu", {"model": "mini"}, []),
    ],
)
def test_the_allocator_of_a_gpu_may_grow_its_segments(
    device: str, more: dict[str, Any], grows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(load_module, "load_pipeline", lambda **_: FakePipeline())
    monkeypatch.setattr("redux_pipelines.devices.grow_segments", asked.append)
    model.load(ServerSettings(**more), device)
    assert asked == grows
