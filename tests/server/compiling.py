"""A pipeline that reports what it is told to have compiled, in the place of a model's."""

import pytest

from redux_pipelines.contract.types import CompilePlan, CompileReport
from redux_pipelines.fake import FakePipeline
from redux_pipelines.loading import load

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


def loads(monkeypatch: pytest.MonkeyPatch, report: CompileReport) -> Compiling:
    """What is loaded from now on, whichever model is asked for."""
    pipeline = Compiling(report)
    monkeypatch.setattr(load, "load_pipeline", lambda **_: pipeline)
    return pipeline
