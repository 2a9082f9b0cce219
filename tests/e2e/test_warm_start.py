"""Compiled code is found by the next process; damaged, it costs no more than compiling."""

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


def warm_up(home: Path) -> str:
    """A process of its own, whose compiler has kept nothing but what is in ``home``."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(home),
        "TORCHINDUCTOR_CACHE_DIR": str(home.parent / "elsewhere"),
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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that a first start has filled."""
    home = tmp_path_factory.mktemp("warm") / "cache"
    compiled, reused = graphs(warm_up(home))
    assert (compiled > 0, reused) == (True, 0)
    return home


def kept_in(home: Path) -> Path:
    (kept,) = (home / "flux-redux" / "compile").iterdir()
    return kept


def objects(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in kept_in(home).rglob("*.so")}


def test_the_next_process_reuses_compiled_code(home: Path) -> None:
    before = objects(home)
    assert before, "a CPU's object files are kept"
    compiled, reused = graphs(warm_up(home))
    assert compiled == reused
    assert objects(home) == before


@pytest.mark.parametrize("pattern", ["fxgraph/*/*/*", "aotautograd/*/*", "*/*.so"])
def test_damaged_code_is_compiled_anew(home: Path, pattern: str) -> None:
    damaged = [path for path in kept_in(home).glob(pattern) if path.is_file()]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:100])
    assert graphs(warm_up(home))[0] > 0
    compiled, reused = graphs(warm_up(home))
    assert compiled == reused > 0
