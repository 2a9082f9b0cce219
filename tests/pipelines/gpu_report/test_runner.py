"""A stage that goes wrong, in whatever way, leaves the others and the report alone."""

import ctypes
import json
import signal
import time

import pytest
import torch
from gpu_report.report import Report
from gpu_report.runner import DeviceLost, NotRun, OutOfTime, Runner, Stage, limited


def stage(name, run, *, need_s=0.0, limit_s=30.0):
    return Stage(name, run, need_s=need_s, limit_s=limit_s)


def measured(section):
    section["figure"] = 1


def raising(error):
    def run(section):
        section["begun"] = True
        raise error

    return run


@pytest.fixture
def report(tmp_path):
    return Report.begun(tmp_path, device="cpu", scale="small", budget_s=60)


def runner_of(report, *, elapsed_s=0.0, budget_s=60.0, on_hang=lambda: None, **more):
    started = time.time() - elapsed_s
    return Runner(report, started=started, budget_s=budget_s, on_hang=on_hang, **more)


def on_disk(report):
    return json.loads(report.path.read_text())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("a wrong number"), "ValueError: a wrong number"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: "),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "out of memory: "),
    ],
)
def test_a_stage_that_fails_leaves_its_reason_and_the_others(report, error, text):
    stages = [stage("one", measured), stage("two", raising(error)), stage("three", measured)]
    runner_of(report).run(stages)
    found = on_disk(report)
    assert set(found["failures"]) == {"two"}
    assert text in found["failures"]["two"]
    assert set(found["stages_s"]) == {"one", "two", "three"}
    assert found["two"] == {"begun": True}
    assert found["three"] == {"figure": 1}


def test_what_a_failed_stage_held_is_let_go(report):
    class Held:
        alive = 0

        def __init__(self):
            Held.alive += 1

        def __del__(self):
            Held.alive -= 1

    def run(_section):
        held = Held()
        raise ValueError(f"with {held}")

    runner_of(report).run([stage("one", run)])
    assert Held.alive == 0


def test_what_cannot_be_measured_here_is_no_failure(report):
    runner_of(report).run([stage("one", raising(NotRun("needs CUDA")))])
    assert on_disk(report)["failures"] == {}
    assert on_disk(report)["one"]["not_run"] == "needs CUDA"


def test_a_stage_that_no_longer_fits_is_left_out_and_a_shorter_one_is_not(report):
    runner = runner_of(report, elapsed_s=50, budget_s=60)
    runner.run([stage("long", measured, need_s=20), stage("short", measured, need_s=1)])
    found = on_disk(report)
    assert found["failures"]["long"].startswith("no time left: needs about 20 s, ")
    assert "long" not in found["stages_s"]
    assert found["short"] == {"figure": 1}


def test_a_stage_that_takes_too_long_is_ended_even_where_errors_are_swallowed(report):
    def run(section):
        section["begun"] = True
        while True:
            try:
                time.sleep(5)
            except Exception:
                continue

    runner_of(report).run([stage("slow", run, limit_s=0.2), stage("next", measured)])
    found = on_disk(report)
    assert "OutOfTime: stopped after 0 s" in found["failures"]["slow"]
    assert found["next"] == {"figure": 1}


def test_a_stage_has_no_more_time_than_is_left(report):
    runner = runner_of(report, elapsed_s=58.5, budget_s=60)
    began = time.monotonic()
    runner.run([stage("slow", lambda _: time.sleep(30))])
    assert time.monotonic() - began < 20
    assert "OutOfTime" in on_disk(report)["failures"]["slow"]


def test_the_alarm_is_off_afterwards():
    before = signal.getsignal(signal.SIGALRM)
    with limited(20):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_stage_that_hears_no_signal_is_given_up_with_what_it_has(report):
    given_up = []

    def run(section):
        section["begun"] = True
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        try:
            ctypes.CDLL(None).usleep(900_000)  # as in a driver's call: no handler runs meanwhile
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})

    runner = runner_of(report, on_hang=lambda: given_up.append(on_disk(report)), hangs_s=0.2)
    runner.run([stage("deaf", run, limit_s=0.1)])
    assert given_up[0]["failures"]["deaf"].startswith("hangs")
    assert given_up[0]["deaf"] == {"begun": True}


def test_a_lost_device_ends_the_process_and_what_is_left_is_for_the_next(report, tmp_path):
    lost = raising(RuntimeError("CUDA error: an illegal memory access was encountered"))
    stages = [stage("one", measured), stage("two", lost), stage("three", measured)]
    with pytest.raises(DeviceLost):
        runner_of(report).run(stages)
    found = on_disk(report)
    assert "illegal memory access" in found["failures"]["two"]
    assert "three" not in found
    runs = []
    again = [stage(each.name, lambda _, name=each.name: runs.append(name)) for each in stages]
    runner_of(Report.resumed(tmp_path)).run(again)
    assert runs == ["three"]
    assert set(on_disk(report)["stages_s"]) == {"one", "two", "three"}


def test_numbers_that_json_has_not_are_none(report):
    runner_of(report).run([stage("one", lambda section: section.update(a=[float("nan"), 1.5]))])
    assert on_disk(report)["one"] == {"a": [None, 1.5]}


def test_out_of_time_is_no_exception_that_a_library_would_catch():
    assert not issubclass(OutOfTime, Exception)


def test_a_disk_that_is_full_ends_no_stage(report, monkeypatch, capsys):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "save", full)
    runner_of(report).run([stage("one", measured), stage("two", measured)])
    assert list(report.content["stages_s"]) == ["one", "two"]
    assert "cannot be written: [Errno 28]" in capsys.readouterr().out
