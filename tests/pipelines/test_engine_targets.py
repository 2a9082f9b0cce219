"""Which targets of the engine's benchmark hold, from figures made up here."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "pipelines" / "benchmarks"


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("engine_targets")


def case(cpu, wall, target, network="wide", size=512, prompt="empty"):
    ratios = {"ratio_cpu": cpu, "ratio_wall": wall}
    return {"network": network, "size": size, "prompt": prompt, "target": target, **ratios}


@pytest.mark.parametrize(
    ("device", "clock", "ratios"), [("cpu", "cpu", [0.7, 0.8]), ("cuda:0", "wall", [0.9, 0.76])]
)
def test_what_counts_is_processor_time_on_a_cpu_and_time_on_a_gpu(targets, device, clock, ratios):
    judged = targets.judge([case(0.7, 0.9, 0.76), case(0.8, 0.76, 0.76)], device)
    assert [each["ratio"] for each in judged] == ratios
    assert {each["clock"] for each in judged} == {clock}
    assert [each["holds"] for each in judged] == [ratio <= 0.76 for ratio in ratios]


def test_not_a_number_does_not_hold(targets):
    assert not targets.judge([case(float("nan"), 0.1, 0.76)], "cpu")[0]["holds"]


def test_table_names_each_case_and_what_does_not_hold(targets):
    judged = targets.judge(
        [case(0.7, 0.9, 0.76), case(0.99, 0.1, 0.9, "narrow", 1536, "encoded")], "cpu"
    )
    good, bad = targets.table(judged).splitlines()
    assert "wide" in good
    assert "0.700 of at most 0.76 (cpu)  holds" in good
    assert "1536²  encoded  0.990 of at most 0.90 (cpu)  DOES NOT HOLD" in bad


def test_compiled_ours_may_be_as_slow_as_theirs_and_no_slower(targets):
    """And not compiled faster, the more so the more of the tokens an empty prompt saves."""
    for each, ratio in targets.EAGER.items():
        assert targets.target(each, is_compiled=True) == 1.0
        assert targets.target(each, is_compiled=False) == ratio < 1
    for network in ("wide", "narrow"):
        of = {key[1:]: ratio for key, ratio in targets.EAGER.items() if key[0] == network}
        assert of[512, "empty"] < of[1024, "empty"] < of[1024, "encoded"]
