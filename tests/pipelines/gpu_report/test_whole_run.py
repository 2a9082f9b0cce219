"""The whole report in little, as a process that finds everything by itself."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_report import cli, schema
from gpu_report.report import FILE
from gpu_report.stages import NAMES
from gpu_report.table import table

from fp8_products import REFUSAL

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "pipelines/benchmarks/gpu_report"
NEED_CUDA = {"graphs", "compile", "row_kernels", "memory"}


LOSES_ITS_DEVICE = """
import sys, time
from gpu_report import paths
paths.set_up()
from gpu_report import cli, correctness
def lost(subject, section):
    section["side"] = subject.scale.side
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
correctness.blocks = lost
sys.exit(cli.main(sys.argv[1:], started=time.time()))
"""


def in_little(out: Path, *command: str, **more: str) -> tuple[str, int, dict]:
    """What a run on a CPU printed, its exit status, and its report.

    Nothing in its environment helps it find the project.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command, "--device", "cpu", "--small", "--out", str(out)],
        cwd=out,
        env={**environment, "OMP_NUM_THREADS": "1", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,  # a loaded machine takes ten times as long
        check=False,
    )
    return done.stdout, done.returncode, json.loads((out / FILE).read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return in_little(tmp_path_factory.mktemp("report"), str(SCRIPT))


def test_every_stage_runs_in_little_on_a_cpu(run):
    printed, code, report = run
    assert report["failures"] == {}, printed
    assert code == 0
    assert tuple(report["stages_s"]) == NAMES
    assert {name for name in NAMES if report[name].get("not_run") == "needs CUDA"} == NEED_CUDA
    left_out = {"fp8"} if REFUSAL else set()
    assert {name for name in NAMES if "not_run" in report[name]} == NEED_CUDA | left_out
    assert report["environment"]["torch"]
    assert report["environment"]["gpu"] is None


def test_the_report_has_the_form_that_is_described(run):
    assert schema.problems(run[2]) == []


def test_the_run_tells_its_progress_and_ends_with_the_table(run):
    printed, _, report = run
    assert table(report) in printed
    assert "s] image ..." in printed
    assert "s] image: done in" in printed


def test_what_runs_is_right_and_reuses_what_it_was_forced_to(run):
    report = run[2]
    errors = report["blocks"]["errors"]
    assert 0 < errors["engine"] < 1e-5
    assert REFUSAL is not None or 0.005 < errors["engine fp8"] < 0.1
    assert report["diffusers"]["relative_difference"] < 1e-5
    assert report["step_cache"]["exact"]["reused_steps"] == 0
    assert report["step_cache"]["forced"]["reused_steps"] == 1
    assert report["server"]["completed"] == report["server"]["requests"]


def test_after_a_lost_device_a_new_process_goes_on_with_what_is_left(tmp_path):
    stages = ("--stages", "blocks,attention,products")
    printed, code, report = in_little(
        tmp_path, "-c", LOSES_ITS_DEVICE, *stages, PYTHONPATH=str(SCRIPT.parent)
    )
    assert code == 1
    assert list(report["failures"]) == ["blocks"]
    assert "illegal memory access" in report["failures"]["blocks"]
    assert list(report["stages_s"]) == ["blocks", "attention", "products"]
    assert report["blocks"] == {"side": 512}
    assert report["attention"]["rows"]
    assert schema.problems(report) == []
    assert printed.count("blocks ...") == 1
    assert printed.count("attention: done") == 1


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path, capsys):
    """In this process: another one would only load torch again."""
    (tmp_path / "file").write_text("")
    given = ["--device", "cpu", "--small", "--out", str(tmp_path / "file")]
    assert cli.main(given, started=time.time()) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"--out {tmp_path / 'file'} cannot be written to")
    assert told.count("\n") == 1
