"""Compiled code is found by the next process, and a damaged file costs no more than compiling."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]


def warm_up(home: Path, name: str) -> str:
    """A process of its own, whose compiler has kept nothing but what is in ``home``."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(home),
        "TORCHINDUCTOR_CACHE_DIR": str(home.parent / name),
        "OMP_NUM_THREADS": "1",
        "FLUX_REDUX_MODEL": "tiny",
    }
    arguments = ["warmup", "--device", "cpu", "--compile", "full", "--sizes", "512x512,768x1024"]
    done = subprocess.run(
        [sys.executable, "-m", "redux_server", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def graphs(printed: str) -> tuple[int, int]:
    found = re.search(r"compiled \(full\): (\d+) graphs, of which (\d+) were kept", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


def test_the_next_process_reuses_compiled_code(tmp_path: Path) -> None:
    home = tmp_path / "cache"
    assert graphs(warm_up(home, "first")) == (1, 0)
    (kept,) = (home / "flux-redux" / "compile").iterdir()
    whole = kept.read_bytes()
    assert graphs(warm_up(home, "second")) == (1, 1)
    assert kept.read_bytes() == whole
    kept.write_bytes(whole[: len(whole) // 2])
    printed = warm_up(home, "third")
    assert graphs(printed) == (1, 0)
    assert "it is damaged" in printed
    assert graphs(warm_up(home, "fourth")) == (1, 1)
