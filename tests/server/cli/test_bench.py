"""``flux-redux bench`` as it is typed, against imitated services on loopback."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from e2e.live import ROOT, wait_until
from redux_server.bench.page import Drawn
from redux_server.bench.page import page as write_page
from redux_server.cli import bench as verb
from redux_server.cli.main import EXIT_USAGE, run
from server.bench.hosted import KEY, Hosted, serving, variation

QUICK = ["--param", "size=512*512", "--encoder", "none"]


def quick(seconds: float = 0.02, **options: Any) -> Hosted:
    return Hosted(lambda _: seconds, render=variation, **options)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTED_KEY", KEY)


def report_of(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return told


def test_two_targets_are_measured_and_the_report_has_what_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosted = quick(per_minute=10, retry_after_s=0.05, fail={3: "task", 4: "500"})
    with serving(quick()) as ours, serving(hosted) as theirs:
        hosted.submits = []
        arguments = [
            *("bench", "--target", f"ours={ours},key_env=HOSTED_KEY,gpu_hour=2,mode=stream"),
            *("--target", f"hosted={theirs},key_env=HOSTED_KEY,price=0.025", "--images", "9"),
            *("--clients", "2", "--out", str(tmp_path), "--yes", *QUICK),
        ]
        assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "hosted  9 images, $0.23 at $0.025 an image" in printed
    assert "in all 18 images, $0.23" in printed
    told = report_of(tmp_path)
    assert told["targets"]["ours"]["completed"] == 9
    theirs_told = told["targets"]["hosted"]
    assert (theirs_told["completed"], theirs_told["errors"]) == (7, 2)
    assert theirs_told["errors_by_kind"] == {"failed": 1, "http_500": 1}
    assert theirs_told["price_per_image"] == 0.025
    for name in ("p50", "p95", "p99"):
        found = told["targets"]["ours"]["latency_s"][name]
        low, high = found["ci95"]
        assert 0 < low <= found["value"] <= high
        low, high = told["ratios"]["hosted/ours"][name]["ci95"]
        assert low <= told["ratios"]["hosted/ours"][name]["value"] <= high
    assert any(text.startswith("hosted: 1 of 9 requests failed") for text in told["findings"])
    assert told["targets"]["ours"]["images_per_minute"] > 0
    rows = list(csv.DictReader((tmp_path / "requests.csv").read_text().splitlines()))
    assert len(rows) == 18
    assert sum(row["outcome"] == "completed" for row in rows) == 16
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)|url\((?!#)|<script|@import', page), (
        "needs a network"
    )
    assert page.count("<svg") == 3
    assert page.count("data:image/jpeg") > 9
    assert "[pro] is not [dev]" in page
    assert "Likeness is not beauty" in page
    hostile = "<script>alert(1)</script>"
    told["findings"].append(hostile)
    told["notes"].append(hostile)
    told["targets"]["hosted"]["errors_by_kind"][hostile] = 1
    assert hostile not in write_page(told, Drawn())


def test_the_key_is_nowhere_in_what_is_written_or_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(quick(fail={0: "task", 1: "500", 2: "400"})) as url:
        arguments = ["bench", "--target", f"A={url},key_env=HOSTED_KEY", "--images", "4"]
        assert run([*arguments, "--out", str(tmp_path), *QUICK]) == 0
    printed = capsys.readouterr()
    for path in (tmp_path / "report.json", tmp_path / "report.html", tmp_path / "requests.csv"):
        assert "[key]" in path.read_text(), "what the target said of it is there"
        assert KEY not in path.read_text()
    assert KEY not in printed.out + printed.err


def test_a_dry_run_says_what_it_would_cost_and_sends_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = "hosted=https://api.example.invalid,key_env=HOSTED_KEY,price=0.025"
    assert run(["bench", "--target", target, "--images", "30", "--dry-run"]) == 0
    assert "hosted  30 images, $0.75 at $0.025 an image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "bench needs a server to measure: --target ours="),
        (["--target", "A"], "--target must be NAME=URL,key_env=VARIABLE"),
        (["--target", f"A=http://h,key={KEY}"], "a key is never given on the command line"),
        (["--target", f"A=http://u:{KEY}@h"], "its URL must have no user, password"),
        (["--target", "A=ftp://h"], "its URL must be like http://127.0.0.1:8000"),
        (["--target", "A=http://h,key_env=NO_SUCH"], "the variable NO_SUCH is not set"),
        (["--target", "A=http://h,price=-1"], "price must be dollars"),
        (["--target", "A=http://h,mode=push"], "mode must be one of poll, sync, stream"),
        (["--target", "A=http://h", "--target", "A=http://i"], "two targets are named A"),
        (["--target", "A=http://h,price=0.05", "--images", "21"], "this would cost $1.05"),
        (
            ["--target", "A=http://h,price=1", "--images", "9", "--max-cost", "8"],
            "this would cost $9.00, more than $8.00; nothing was sent",
        ),
        (["--target", "A=http://h", "--max-cost", "1"], "A has no price"),
        (["--target", "A=http://h"], "nobody can be asked here whether to go on; give --yes"),
        (["--target", "A=http://h", "--rate", "3", "--clients", "2"], "--rate sends whatever"),
        (["--target", "A=http://h", "--rate", "3/week"], "invalid rate value: '3/week'"),
        (["--target", "A=http://h", "--param", "size=9*9"], "--param size must be"),
        (["--target", "A=http://h", "--param", "seed=1"], "the bench sets seed itself"),
        (["--target", "A=http://h", "--images", "0"], "--images must be 1 to 1e+06, got 0"),
        (["--target", "A=http://h", "--pictures", "/nowhere"], "no such folder or manifest"),
        (["--target", "A=http://127.0.0.1:1", "--yes"], "cannot reach A at http://127.0.0.1:1"),
    ],
)
def test_a_mistake_is_answered_in_one_line_without_the_key(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *arguments, "--out", str(tmp_path / "out")]) == EXIT_USAGE
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert len(printed.err.splitlines()) == 1
    assert KEY not in printed.err
    assert not (tmp_path / "out" / "report.json").exists()


def test_what_is_not_installed_is_told_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verb, "find_spec", lambda name: None)
    assert run(["bench", "--target", "A=http://127.0.0.1:1"]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert said == (
        "flux-redux: bench needs aiohttp and matplotlib; install it with: "
        "pip install -c constraints.txt '.[bench]' (in the project's folder)\n"
    )


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    hosted = quick(0.02)
    hosted.service_s = lambda _: 0.02 if len(hosted.tasks) < 6 else 60.0
    paths = [str(ROOT / name) for name in ("server", "pipelines", "kernels", "weights")]
    with serving(hosted) as url:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "redux_server", "bench", "--images", "50"),
                *("--target", f"A={url},key_env=HOSTED_KEY", "--clients", "2"),
                *("--out", str(tmp_path), *QUICK),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: len(hosted.tasks) >= 8, 60, what=lambda: str(process.poll()))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; writing the report of what was measured" in said
    assert "Traceback" not in said
    told = report_of(tmp_path)
    assert told["interrupted"] is True
    assert told["targets"]["A"]["completed"] == 6
    assert told["targets"]["A"]["unfinished"] == 2
    assert len(hosted.tasks) == 8
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_bench_loads_neither_torch_nor_matplotlib_before_it_has_measured() -> None:
    code = (
        "import sys; import redux_server.cli.bench, redux_server.bench.run; "
        "print(sorted({'torch', 'matplotlib', 'fastapi', 'sqlalchemy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_manifest_gives_pictures_parameters_of_their_own(tmp_path: Path) -> None:
    from server.bench.runs import dot

    (tmp_path / "a.png").write_bytes(dot())
    lines = [{"image": "a.png", "prompt": "gold"}, {"image": "a.png", "size": "640*512"}]
    manifest = tmp_path / "list.jsonl"
    manifest.write_text("\n".join(json.dumps(line) for line in lines))
    hosted = quick()
    with serving(hosted) as url:
        arguments = ["bench", "--target", f"A={url}", "--images", "4", "--pictures", str(manifest)]
        assert run([*arguments, "--out", str(tmp_path / "out"), *QUICK]) == 0
    bodies = [task.body for task in hosted.tasks.values()]
    assert [body["prompt"] for body in bodies] == ["gold", "", "gold", ""]
    assert [body["size"] for body in bodies] == ["512*512", "640*512"] * 2
    assert [body["seed"] for body in bodies] == [0, 0, 1, 1]
    told = report_of(tmp_path / "out")
    assert told["targets"]["A"]["errors"] == 0


def a_report(folder: Path, name: str, seconds: float, url: str, hosted: Hosted) -> Path:
    hosted.service_s = lambda rng: rng.uniform(0.9, 1.1) * seconds
    arguments = ["bench", "--target", f"A={url}", "--images", "12", "--out", str(folder / name)]
    assert run([*arguments, "--param", "size=512*512", "--encoder", "none"]) == 0
    return folder / name


def test_compare_tells_a_regression_from_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosted = quick()
    with serving(hosted) as url:
        old = a_report(tmp_path, "old", 0.04, url, hosted)
        slow = a_report(tmp_path, "slow", 0.12, url, hosted)
    capsys.readouterr()
    assert run(["bench", "compare", str(old), str(slow / "report.json")]) == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert re.match(r"A  p50  0\.\d+ s -> 0\.\d+ s  x\d\.\d+ \(\d\.\d+ to \d\.\d+\)  slower", line)
    assert run(["bench", "compare", str(slow), str(old)]) == 0
    assert "faster" in capsys.readouterr().out
    assert run(["bench", "compare", str(old), str(old)]) == 0
    assert "no difference seen" in capsys.readouterr().out


def test_compare_refuses_what_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosted = quick()
    with serving(hosted) as url:
        old = a_report(tmp_path, "old", 0.01, url, hosted)
    told = report_of(old)
    for change, complaint in (
        ({"workload": {**told["workload"], "hash": "0"}}, "asked for different things"),
        ({"load": {"kind": "closed", "clients": 9}}, "had different loads"),
        ({"targets": {"B": told["targets"]["A"]}}, "no target is in both"),
        ({"schema": 7}, "is no report of"),
    ):
        (tmp_path / "new.json").write_text(json.dumps({**told, **change}))
        assert run(["bench", "compare", str(old), str(tmp_path / "new.json")]) == EXIT_USAGE
        assert complaint in capsys.readouterr().err


def test_a_target_whose_images_are_of_no_use_is_named(tmp_path: Path) -> None:
    """Over the wire, judged by pixels alone; the other target is not accused."""
    bad = quick()
    bad.render = lambda body: variation({**body, "seed": 5, "size": _size_of(body)})

    def _size_of(body: dict[str, Any]) -> str:
        return "520*512" if body["seed"] == 2 else "512*512"

    with serving(quick()) as good_url, serving(bad) as bad_url:
        arguments = ["bench", "--target", f"good={good_url}", "--target", f"bad={bad_url}"]
        assert run([*arguments, "--images", "18", "--out", str(tmp_path), *QUICK]) == 0
    told = report_of(tmp_path)
    assert told["targets"]["bad"]["errors_by_kind"] == {"wrong_size": 6}
    assert told["targets"]["bad"]["completed"] == 12
    assert told["targets"]["good"]["errors"] == 0
    found = " ".join(told["findings"])
    assert "bad: the same picture for all seeds" in found
    assert "bad: 6 of 18 requests came in a wrong size (520*512 instead of 512*512)" in found
    assert "good" not in found


def test_a_full_disk_loses_images_but_not_the_report(small_disk: Path) -> None:
    hosted = quick()
    hosted.render = lambda _: os.urandom(2**20)
    with serving(hosted) as url:
        arguments = ["bench", "--target", f"A={url}", "--images", "14", "--out"]
        assert run([*arguments, str(small_disk / "out"), *QUICK]) == 1
    told = report_of(small_disk / "out")["targets"]["A"]
    assert told["errors_by_kind"]["not_saved"] > 3
    assert sum(told["errors_by_kind"].values()) == 14
    assert (small_disk / "out" / "report.html").exists()
    rows = (small_disk / "out" / "requests.csv").read_text().splitlines()
    assert len(rows) == 15
