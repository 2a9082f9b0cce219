"""`flux-redux weights quantize` and `tasks unbind` as a user meets them."""

from pathlib import Path

import pytest
from safetensors import safe_open

from redux_pipelines.loading import fp8_export
from redux_pipelines.loading.load import load_pipeline
from redux_pipelines.loading.tiny import build_tiny
from redux_server.cli.main import run
from redux_server.database.migration import open_database
from redux_server.dispatch.presence import Presence, WorkerState
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


def test_a_checkpoint_is_made_and_serves(
    tiny: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, redux = tiny
    out = tmp_path / "fp8"
    assert run(["weights", "quantize", "--base", str(base), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "MB are now" in printed.err
    assert "MiB written" in printed.err
    assert "non-commercial" in printed.err
    with safe_open(out / WEIGHTS, framework="pt") as file:
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert "F8_E4M3" in dtypes
    pipeline = load_pipeline(base=out, redux=redux, device="cpu", transformer_dtype="fp8")
    assert pipeline.info.dtype == "float32 with fp8"


def test_an_out_that_exists_is_refused(
    tiny: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["weights", "quantize", "--base", str(tiny[0]), "--out", str(tmp_path)]) == 1
    assert f"{tmp_path} exists: choose another --out" in capsys.readouterr().err


def test_a_base_that_is_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["weights", "quantize", "--base", "/nowhere/at/all", "--out", str(out)]) == 1
    assert "/nowhere/at/all is neither a directory nor a hub" in capsys.readouterr().err
    assert not out.exists()


def test_ctrl_c_leaves_nothing_and_exits_as_shells_expect(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fp8_export, "save_file", interrupted)
    assert run(["weights", "quantize", "--base", str(tiny[0]), "--out", str(tmp_path / "a")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_tasks_that_no_worker_takes_are_let_go_once_a_worker_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = open_database(f"sqlite:///{tmp_path / 'tasks.db'}")
    store, presence = TaskStore(database), Presence(database)
    for fingerprint in ("aaa/1", "bbb/1", "bbb/1"):
        store.accept([NewTask("k", "m", {}, fingerprint=fingerprint)], max_open=9)
    command = ["tasks", "unbind", "--data-dir", str(tmp_path)]
    assert run(command) == 2
    assert "no worker is ready" in capsys.readouterr().err
    presence.announce("w", "cpu", WorkerState.READY, fingerprint="aaa/1")
    assert run(command) == 0
    said = capsys.readouterr().out
    assert "the weights bbb and version 1: no ready worker runs it" in said
    assert "2 tasks may be taken by any worker now" in said
    assert store.bound() == {"": 2, "aaa/1": 1}
    database.dispose()
