"""Weights that are missing or damaged end a start, with what is wrong with them.

The files are those of the embedded model, with one of them broken.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.live import ROOT, LiveServer

MINI = ROOT / "weights" / "mini"
EXIT_USAGE = 2
LIMIT_S = 5.0  # of a processor: a machine that is busy with something else may take longer

Break = Callable[[Path], None]


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def half_a_json(path: Path) -> None:
    path.write_text('{"in_channels": 64')


def copy_of_mini(folder: Path) -> tuple[Path, Path]:
    """``(base, redux)`` made of hard links; a file is replaced before it is broken."""
    for source in MINI.rglob("*"):
        target = folder / source.relative_to(MINI)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif "report" not in source.parts:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
    return folder / "base", folder / "redux"


def broken_mini(folder: Path, name: str, how: Break) -> tuple[Path, Path]:
    base, redux = copy_of_mini(folder)
    path = folder / name
    data = path.read_bytes()
    path.unlink()  # the link, not the file of the project
    path.write_bytes(data)
    how(path)
    return base, redux


WEIGHTS = "base/transformer/diffusion_pytorch_model.safetensors"
EARLY = [
    (WEIGHTS, remove, "is missing"),
    (WEIGHTS, empty, "is empty"),
    (WEIGHTS, cut, "bytes instead of"),
    (WEIGHTS, cut_in_the_header, "cut short"),
    (WEIGHTS, lfs_pointer, "not a safetensors file"),
    ("base/vae/config.json", half_a_json, "is not JSON"),
    ("base/scheduler/scheduler_config.json", remove, "is missing"),
    ("redux/image_encoder/model.safetensors", cut, "bytes instead of"),
    ("redux/image_embedder/config.json", remove, "is missing"),
]


@pytest.mark.parametrize(("name", "how", "says"), EARLY)
def test_missing_or_cut_weights_end_the_start_with_their_name(
    tmp_path: Path, name: str, how: Break, says: str
) -> None:
    base, redux = broken_mini(tmp_path / "weights", name, how)
    spent = os.times()
    command = [sys.executable, "-m", "redux_server", "serve", "--base", str(base)]
    done = subprocess.run(
        [*command, "--redux", str(redux), "--data-dir", str(tmp_path / "data"), "--port", "0"],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": paths(), "HOME": str(tmp_path)},
    )  # fmt: skip
    now = os.times()
    used_s = (now.children_user - spent.children_user) + (
        now.children_system - spent.children_system
    )
    print(f"{used_s:.2f} s of a processor")
    assert done.returncode == EXIT_USAGE, (done.returncode, done.stderr)
    assert "the weights are incomplete" in done.stderr and says in done.stderr
    assert str(tmp_path / "weights" / name) in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 6
    assert used_s < LIMIT_S


def paths() -> str:
    return os.pathsep.join(
        str(ROOT / name) for name in ("server", "pipelines", "kernels", "weights")
    )


def other_network(path: Path) -> None:
    """A config that belongs to other weights: whole files that do not fit together."""
    config = json.loads(path.read_text())
    config["num_layers"] += 1
    path.write_text(json.dumps(config))


def test_weights_that_do_not_fit_end_the_server_with_the_reason(tmp_path: Path) -> None:
    """Only loading finds them: the API answers meanwhile."""
    base, redux = broken_mini(tmp_path / "weights", "base/transformer/config.json", other_network)
    flags = ("--base", str(base), "--redux", str(redux), "--device", "cpu")
    server = LiveServer(tmp_path / "data", *flags, model="mini")
    server.start(wait=False)
    try:
        assert server.process.wait(120) == EXIT_USAGE
    finally:
        server.stop()
    assert "flux-redux: the model cannot be loaded: " in server.log
    assert "transformer" in server.log.rpartition("flux-redux: ")[2]
    assert "Traceback" not in server.log
