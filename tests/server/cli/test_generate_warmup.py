"""``warmup``, and what settings make of ``--compile`` and ``--cuda-graphs``."""

from pathlib import Path
from typing import Any

import pytest
import structlog

from redux_pipelines.contract.types import WARM_UP_SIZES, CompilePlan, CompileReport
from redux_pipelines.fake import FakePipeline
from redux_pipelines.loading import load
from redux_server import __version__
from redux_server.cli import serve
from redux_server.cli.main import EXIT_USAGE, run
from redux_server.settings import ServerSettings, UsageError
from redux_server.worker import main, model
from redux_server.worker.model import cache_dir

DONE = CompileReport(
    mode="full",
    cuda_graphs=0,
    failures=(),
    seconds={"16x16 tokens, batch 1": 33.04},
    graphs=2,
    reused=1,
)
FAILED = CompileReport("off", 0, ("not compiled: no compiler here",), {})


class Compiling(FakePipeline):
    """Reports what it is told to; remembers the plans."""

    def __init__(self, report: CompileReport) -> None:
        super().__init__()
        self.report = report
        self.plans: list[CompilePlan] = []

    def compile(self, plan: CompilePlan) -> CompileReport:
        self.plans.append(plan)
        return self.report


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def loads(monkeypatch: pytest.MonkeyPatch, report: CompileReport) -> Compiling:
    pipeline = Compiling(report)
    monkeypatch.setattr(load, "load_pipeline", lambda **_: pipeline)
    return pipeline


def test_warmup_says_what_it_did(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = loads(monkeypatch, DONE)
    assert run(["warmup", "--compile", "full", "--sizes", "512x640,1024*1024"]) == 0
    (plan,) = pipeline.plans
    assert plan == CompilePlan(
        mode="full",
        sizes=((512, 640), (1024, 1024)),
        cuda_graphs=0,
        cache_dir=home / "cache" / "flux-redux" / "compile",
        version=__version__,
    )
    printed = capsys.readouterr().out
    for line in (
        "load the model: 0.0 s",
        "16x16 tokens, batch 1: 33.0 s",
        "compiled (full): 2 graphs, of which 1 were kept from before",
    ):
        assert line in printed.splitlines()


def test_warmup_that_fails_says_why_and_exits_with_1(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = loads(monkeypatch, FAILED)
    assert run(["warmup", "--compile", "blocks"]) == 1
    assert "not compiled: no compiler here" in capsys.readouterr().out
    assert pipeline.plans[0].sizes == WARM_UP_SIZES


def test_the_fake_model_has_nothing_to_compile(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["warmup", "--model", "fake", "--compile", "full"]) == 1
    assert "the fake model has nothing to compile" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to warm up: give --compile full (or blocks), or --cuda-graphs N"),
        (["--compile", "full", "--sizes", "9x9"], "--sizes must be sizes separated by commas"),
        (["--compile", "full", "--sizes", ""], "--sizes must be sizes separated by commas"),
        (["--compile", "yes"], "--compile must be one of off, blocks, full, got 'yes'"),
        (["--compile", "full", "--backend", "diffusers"], "need --backend engine"),
        (["--cuda-graphs", "2", "--backend", "diffusers"], "need --backend engine"),
        (["--cuda-graphs", "65"], "--cuda-graphs must be at most 64, got 65"),
    ],
)
def test_what_cannot_be_warmed_up_is_refused_at_once(
    arguments: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(load, "load_pipeline", lambda **_: pytest.fail("loaded"))
    assert run(["warmup", *arguments]) == EXIT_USAGE
    assert complaint in capsys.readouterr().err


def test_other_verbs_refuse_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(tmp_path / "a.png")
    assert run(["generate", picture, "--compile", "full", "--backend", "diffusers"]) == EXIT_USAGE
    assert "--compile and --cuda-graphs need --backend engine" in capsys.readouterr().err
    with pytest.raises(UsageError, match="need --backend engine, got 'diffusers'"):
        serve.check(ServerSettings(data_dir=tmp_path, compile="full", backend="diffusers"))


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_dir() is None


def load_worker(settings: ServerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_warm_up", lambda *_: None)
    model._load(settings, "cpu")


@pytest.mark.parametrize(("report", "failures"), [(DONE, 0), (FAILED, 1)], ids=["done", "failed"])
def test_a_worker_compiles_before_it_is_ready_and_runs_on_without(
    report: CompileReport,
    failures: int,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = loads(monkeypatch, report)
    settings = ServerSettings(data_dir=home, compile="full", cuda_graphs=2)
    before = main.metrics.COMPILE_FAILURES._value.get()
    with structlog.testing.capture_logs() as logs:
        load_worker(settings, monkeypatch)
    (plan,) = pipeline.plans
    assert (plan.mode, plan.cuda_graphs, plan.sizes) == ("full", 2, WARM_UP_SIZES)
    assert main.metrics.COMPILE_FAILURES._value.get() == before + failures
    assert main.metrics.COMPILED._value.get() == (report.mode == "full")
    warnings: list[Any] = [each for each in logs if each["log_level"] == "warning"]
    assert [each["reason"] for each in warnings] == list(report.failures)
    described = model._describe(pipeline, settings)
    assert described.endswith("not compiled: its log says why")  # a fake never is


def test_a_worker_that_is_not_asked_to_compiles_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = loads(monkeypatch, DONE)
    load_worker(ServerSettings(data_dir=home), monkeypatch)
    assert pipeline.plans == []
    assert "compiled" not in model._describe(pipeline, ServerSettings(data_dir=home))
