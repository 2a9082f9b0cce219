"""`flux-redux weights quantize` and `tasks unbind` as a user meets them."""

import re
from pathlib import Path

import pytest
from safetensors import safe_open

from redux_pipelines.loading import fp8_export
from redux_pipelines.loading.load import load_pipeline
from redux_pipelines.loading.tiny import build_tiny
from redux_server.api.auth import KeyFileError, KeyRing, read_keys_file
from redux_server.cli.main import EXIT_USAGE, run
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


# --- keys -----------------------------------------------------------------------------------------


def test_keys_are_listed_under_a_header_with_their_last_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data-dir", str(tmp_path)]
    assert run(["keys", "list", *where]) == 0
    said = capsys.readouterr()
    assert said.out == "" and "no keys yet; `flux-redux keys create" in said.err
    for name in ("me", "my phone"):
        assert run(["keys", "create", "--name", name, *where]) == 0
    database = open_database(f"sqlite:///{tmp_path / 'tasks.db'}")
    used = KeyRing(database).list()[1].id
    store = TaskStore(database, clock=lambda: 1_800_000_000.0)
    new = NewTask(used, "m", {"num_images": 1, "num_inference_steps": 1}, request_id="r")
    store.accept([new], max_open=9)
    database.dispose()
    capsys.readouterr()
    assert run(["keys", "list", *where]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["id", "made", "last", "task", "state", "priority", "name"]
    assert re.fullmatch(r"[0-9a-f]{8}  \S+ \S+  -  +valid  +0  me", first), first
    assert f"{used}  " in second and "  2027-01-15 08:00  valid" in second
    assert second.endswith("  my phone")
    assert {line.index(word) for line, word in ((first, "me"), (second, "my"))} == {
        header.index("name")
    }


@pytest.mark.parametrize(
    "name",
    ["", " ", "\t", "a\nb", "a\rb", "a\x1b[2Jb", "a\x00b", "a\u202eb", "a\u2028b", "x" * 129],
)
def test_name_that_is_none_or_forges_a_line_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["keys", "create", "--name", name, "--data-dir", str(tmp_path)]) == EXIT_USAGE
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.isascii() and "--name" in told


@pytest.mark.parametrize("name", ["me", " me ", "Zoë's phone", "例え", "a" * 128, "team/ci #1"])
def test_name_that_can_be_read_is_taken(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data-dir", str(tmp_path)]
    assert run(["keys", "create", "--name", name, *where]) == 0
    run(["keys", "list", *where])
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"  {name.strip()}")


def test_name_of_a_former_version_forges_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = open_database(f"sqlite:///{tmp_path / 'tasks.db'}")
    for name in ("", "a\nffffffff  2026-01-01 00:00", "\x1b[2J"):
        KeyRing(database).create(name)
    database.dispose()
    run(["keys", "list", "--data-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.isprintable() for line in lines)
    assert lines[1].endswith("(no name)") and r"a\nffffffff" in lines[2]


def test_keys_file_has_no_names_with_control_characters(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a\x1b[2Jb:0123456789abcdef\n")
    with pytest.raises(KeyFileError, match="line 1"):
        read_keys_file(file)
