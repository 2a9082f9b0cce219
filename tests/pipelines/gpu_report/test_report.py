"""The JSON on disk is whole at any moment, whoever ends the process that writes it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_report.report import FILE, VERSION, Report

BENCHMARKS = Path(__file__).resolve().parents[3] / "pipelines/benchmarks"
WRITER = """
import sys
from pathlib import Path
from gpu_report.report import Report
report = Report.begun(Path(sys.argv[1]), device="cpu", scale="small", budget_s=1)
while True:
    report.content["stages_s"]["one"] = report.content["stages_s"].get("one", 0) + 1
    report.section("one")["figures"] = ["x" * 100] * 5000
    report.save()
"""


def test_a_process_killed_while_it_writes_leaves_the_last_whole_report(tmp_path):
    for wait_s in (0.05, 0.08):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, env={"PYTHONPATH": str(BENCHMARKS)}) as process:
            while not (tmp_path / FILE).exists():
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(wait_s)
            process.send_signal(signal.SIGKILL)
        found = json.loads((tmp_path / FILE).read_text())
        assert found["stages_s"]["one"] >= 1
        assert len(found["one"]["figures"]) == 5000
        (tmp_path / FILE).unlink()


def test_a_save_puts_a_new_file_in_the_place_of_the_old_one_and_never_changes_it(tmp_path):
    report = Report.begun(tmp_path, device="cpu", scale="small", budget_s=1)
    report.save()
    with report.path.open() as former:
        report.section("one")["figure"] = 1
        report.save()
        assert "one" not in json.load(former)
    assert json.loads(report.path.read_text())["one"] == {"figure": 1}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_resumed_report_has_what_was_found_and_knows_what_was_done(tmp_path):
    report = Report.begun(tmp_path / "new", device="cpu", scale="small", budget_s=460)
    report.section("image")["median_s"] = 1.5
    report.content["stages_s"]["image"] = 2.0
    report.content["failures"]["fp8"] = "no time left"
    report.save()
    again = Report.resumed(tmp_path / "new")
    assert again.content == report.content
    assert again.content["version"] == VERSION
    assert [again.is_done(name) for name in ("image", "fp8", "server")] == [True, True, False]


def test_a_new_report_keeps_the_one_before_it(tmp_path):
    for figure in (1, 2):
        report = Report.begun(tmp_path, device="cpu", scale="small", budget_s=1)
        report.content["started"] = f"2026-01-0{figure}T10:00:00+00:00"
        report.section("one")["figure"] = figure
        report.save()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {FILE, "gpu-report-2026-01-01T100000+0000.json"}
    assert json.loads((tmp_path / FILE).read_text())["one"] == {"figure": 2}
    (tmp_path / FILE).write_text("{")
    Report.begun(tmp_path, device="cpu", scale="small", budget_s=1).save()
    assert len(list(tmp_path.iterdir())) == 3
