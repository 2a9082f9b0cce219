"""What ``doctor`` says of the model: its files, the safety checker, compilers and compiled code."""

import importlib.metadata
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from redux_pipelines.compilation.cache import CodeFolder, machine_facts
from redux_pipelines.errors import WeightsError
from redux_pipelines.images import safety
from redux_pipelines.loading.tiny import build_tiny
from redux_server import __version__
from redux_server.cli.doctor import model
from redux_server.cli.doctor.findings import Finding, Level
from redux_server.cli.doctor.model import check_compile, check_compiler
from redux_server.settings import ServerSettings
from redux_server.worker.model import cache_dir
from server.cli.doctor.findings import levels, only

CPU = torch.device("cpu")


def test_gated_weights_that_are_not_here_need_a_token(settings: ServerSettings) -> None:
    found = list(model.check_model(replace(settings, model="flux-dev")))
    assert levels(iter(found)) == {
        "licence": Level.NOTE,
        "base": Level.MISSING,
        "redux": Level.MISSING,
    }
    assert "https://huggingface.co/black-forest-labs/FLUX.1-dev, then set HF_TOKEN" in found[1].text


def test_offline_weights_must_be_in_the_cache(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = levels(model.check_model(replace(settings, model="flux-dev")))
    assert found["base"] is found["redux"] is Level.MISSING


def test_folders_of_weights_are_checked_file_by_file(
    settings: ServerSettings, tmp_path: Path
) -> None:
    base, redux = build_tiny(tmp_path / "weights")
    chosen = replace(settings, base=str(base), redux=str(redux))
    assert levels(model.check_model(chosen))["base"] is Level.OK
    (base / "vae" / "config.json").unlink()
    found = list(model.check_model(chosen))
    assert found[0].level is Level.MISSING
    assert str(base / "vae" / "config.json") in found[0].text


def test_a_half_downloaded_checkpoint_is_only_noted(
    settings: ServerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, redux = build_tiny(tmp_path / "hub" / "models")
    (redux / "image_embedder" / "config.json").unlink()
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda source, **_: str(redux if "Redux" in source else base),
    )
    found = levels(model.check_model(replace(settings, model="flux-dev")))
    assert found["weights"] is Level.NOTE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = levels(model.check_model(replace(settings, model="flux-dev")))
    assert found["weights"] is Level.MISSING


def test_a_base_that_is_neither_folder_nor_repository_is_missing(settings: ServerSettings) -> None:
    chosen = replace(settings, base="/no/such/place", redux="a/b")
    assert levels(model.check_model(chosen))["settings"] is Level.MISSING


def test_a_wrong_safety_model_is_missing(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(**_: object) -> None:
        raise WeightsError("open-nsfw.onnx has another sha256")

    monkeypatch.setattr(safety, "OpenNsfwChecker", wrong)
    finding = only(model.check_safety_checker(settings))
    assert (finding.level, finding.text) == (Level.MISSING, "open-nsfw.onnx has another sha256")


# --- compiling ------------------------------------------------------------------------------------


@pytest.fixture
def machine(
    settings: ServerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ServerSettings:
    """A machine with g++, and a cache folder of its own that is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return settings


def by_subject(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def keep(monkeypatch: pytest.MonkeyPatch, **facts: str) -> int:
    """Leave a folder of compiled code as a worker does; its bytes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    directory = cache_dir()
    assert directory is not None
    folder = CodeFolder(directory, {**machine_facts(CPU), "version": __version__, **facts})
    assert folder.use()
    (folder.path / "code").write_bytes(b"code" * 500_000)
    return sum(path.stat().st_size for path in folder.path.iterdir())


def test_a_missing_c_compiler_is_noted(
    machine: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (finding,) = check_compiler(machine)
    assert finding.level is Level.NOTE
    assert "apt install gcc" in finding.text


def test_a_machine_that_can_compile_says_with_what(machine: ServerSettings) -> None:
    found = by_subject(check_compile(machine))["torch.compile"]
    assert (found.level, found.text) == (
        Level.OK,
        "can compile for cpu, with /usr/bin/g++; it is off",
    )
    chosen = replace(machine, compile="blocks")
    assert by_subject(check_compile(chosen))["torch.compile"].text.endswith("; --compile blocks")


@pytest.mark.parametrize(("variable", "named"), [(None, "g++"), ("my-clang++", "my-clang++")])
def test_a_missing_cpp_compiler_is_noted_by_the_name_torch_looks_for(
    machine: ServerSettings,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    named: str,
) -> None:
    if variable:
        monkeypatch.setenv("CXX", variable)
    present = {"g++", "gcc", "cc", "my-clang++"} - {named}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in present else None)
    found = by_subject(check_compile(machine))["torch.compile"]
    assert found.level is Level.NOTE
    assert f"the C++ compiler {named} is not there (apt install g++)" in found.text


def test_a_gpu_needs_triton_too(machine: ServerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model, "_check_folder", lambda _: ())
    chosen = replace(machine, device="cuda:0")
    monkeypatch.setattr(model, "version", lambda name: f"3.7 of {name}")
    (found,) = check_compile(chosen)
    assert "can compile for cuda:0, with /usr/bin/g++ and triton 3.7 of triton" in found.text

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(model, "version", absent)
    (found,) = check_compile(chosen)
    assert found.level is Level.NOTE
    assert "not for cuda:0" in found.text
    assert "triton is not installed" in found.text


def test_what_serve_refuses_is_missing(machine: ServerSettings) -> None:
    chosen = replace(machine, compile="full", backend="diffusers")
    assert by_subject(check_compile(chosen))["torch.compile"].level is Level.MISSING


def test_an_empty_cache_says_what_fills_it_and_is_not_made(machine: ServerSettings) -> None:
    found = by_subject(check_compile(machine))["compiled code"]
    assert found.level is Level.OK
    assert "none in " in found.text
    assert "flux-redux warmup" in found.text
    folder = cache_dir()
    assert folder is not None
    assert not folder.exists(), "doctor only looks"


def test_what_is_kept_for_this_machine_and_version_is_told_from_the_rest(
    machine: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = keep(monkeypatch, mode="full") + keep(monkeypatch, mode="blocks")
    keep(monkeypatch, mode="full", version="0.0.0-other")
    keep(monkeypatch, mode="full", processor="another GPU")
    found = by_subject(check_compile(machine))["compiled code"]
    assert found.text.startswith("code of 4 network(s) in ")
    assert found.text.endswith(
        f"; 2 of {size / 1e6:.1f} MB for this machine, torch and version (blocks, full)"
    )
    assert f"{size / 1e6:.1f}" == "4.0"


def test_only_code_of_others_is_said_to_be_of_no_use(
    machine: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(monkeypatch, torch="1.0")
    folder = cache_dir()
    assert folder is not None
    for name, content in (("junk", b"\x00\xff no facts"), ("list", b"[1, 2]")):
        (folder / name).mkdir()
        (folder / name / "facts.json").write_bytes(content)
    found = by_subject(check_compile(machine))["compiled code"]
    assert found.text.startswith("code of 1 network(s) in ")
    assert found.text.endswith("none of them for this machine, torch and version")


def test_a_folder_that_cannot_be_written_is_noted(
    machine: ServerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    found = by_subject(check_compile(machine))["compiled code"]
    assert found.level is Level.NOTE
    assert "cannot be written by this user" in found.text


def test_a_user_without_a_home_is_told_what_to_set(
    machine: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "cache_dir", lambda: None)
    found = by_subject(check_compile(machine))["compiled code"]
    assert found.level is Level.NOTE
    assert "set XDG_CACHE_HOME" in found.text
