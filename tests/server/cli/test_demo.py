"""``demo``: pictures in a folder, and nothing else left."""

import subprocess
import sys
from pathlib import Path

import pytest

from redux_server.cli import demo
from redux_server.cli.main import run


def test_the_demo_leaves_pictures_and_no_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    stop = demo._stop
    monkeypatch.setattr(demo, "_stop", lambda process: (started.append(process), stop(process)))
    monkeypatch.setenv("FLUX_REDUX_DATA_DIR", str(tmp_path / "mine"))
    assert run(["demo", "--model", "fake", "--device", "cpu", "-o", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["input.jpg", "variation-0.png", "variation-1.png"]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(tmp_path / "out" / name) for name in names[1:]]
    assert "was never trained" in printed.err
    assert [process.poll() is not None for process in started] == [True]
    assert not (tmp_path / "mine").exists(), "the user's own data is not touched"


def test_a_demo_whose_server_cannot_start_shows_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert run(["demo", "--redux", str(tmp_path), "--device", "cpu", "-o", out]) == 1
    error = capsys.readouterr().err
    assert "the server ended with code 2" in error
    assert "--redux needs --base" in error


def test_the_demo_leaves_the_web_framework_to_its_server() -> None:
    code = (
        "import sys, redux_server.cli.demo; "
        "print({'torch', 'fastapi', 'uvicorn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
