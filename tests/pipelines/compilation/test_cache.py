"""Compiled code is found again on the same kind of machine, and nothing else is ever loaded."""

import json
import logging
import os

import pytest
import torch

from redux_pipelines.compilation import cache
from redux_pipelines.compilation.cache import MAX_FILES, ArtifactFile, machine_facts

FACTS = {"processor": "a", "torch": "2"}
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def loaded(monkeypatch):
    """What torch was handed; torch gives ``CONTENT`` to be saved."""
    handed = []

    def load(artifacts):
        handed.append(artifacts)
        return object()

    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (CONTENT, object()))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    return handed


@pytest.fixture
def kept(tmp_path, loaded):
    file = ArtifactFile(tmp_path / "new" / "compile", FACTS)
    assert file.save() == len(CONTENT)
    return file


def test_what_was_saved_is_loaded(kept, loaded):
    assert ArtifactFile(kept.path.parent, FACTS).load() == len(CONTENT)
    assert loaded == [CONTENT]


def test_a_first_start_finds_nothing_and_says_nothing(tmp_path, loaded, caplog):
    assert ArtifactFile(tmp_path / "none", FACTS).load() == 0
    assert loaded == []
    assert caplog.text == ""


def test_nothing_compiled_is_nothing_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    file = ArtifactFile(tmp_path, FACTS)
    assert file.save() == 0
    assert not file.path.exists()


@pytest.mark.parametrize("name", FACTS)
def test_another_fact_is_another_file(tmp_path, name):
    other = ArtifactFile(tmp_path, {**FACTS, name: "other"})
    assert other.path != ArtifactFile(tmp_path, FACTS).path
    assert (
        ArtifactFile(tmp_path, dict(reversed(FACTS.items()))).path
        == ArtifactFile(tmp_path, FACTS).path
    )


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(b"\xff\x00 no header\n" + CONTENT)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def carry_in(path):
    header, _, artifacts = path.read_bytes().partition(b"\n")
    facts = {**FACTS, "processor": "with other instructions"}
    path.write_bytes(
        json.dumps({**json.loads(header), "facts": facts}).encode() + b"\n" + artifacts
    )


def speak_otherwise(path):
    path.write_bytes(b"[1, 2]\n" + CONTENT)


def leave_out(path):
    path.write_bytes(b'{"format": "flux-redux compile artifacts 1"}\n' + CONTENT)


def open_to_all(path):
    path.chmod(0o666)


WRONGS = [truncate, empty, garble, flip_a_bit, carry_in, speak_otherwise, leave_out, open_to_all]


@pytest.mark.parametrize("do_wrong", WRONGS)
def test_a_wrong_file_is_a_warning_and_is_written_anew(kept, loaded, caplog, do_wrong):
    do_wrong(kept.path)
    with caplog.at_level(logging.WARNING):
        assert kept.load() == 0
    assert loaded == []
    assert str(kept.path) in caplog.text
    assert kept.save() == len(CONTENT)
    assert kept.load() == len(CONTENT)


def test_a_file_of_another_user_is_not_run(kept, loaded, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: kept.path.stat().st_uid + 1)
    is_root = kept.path.stat().st_uid == 0  # whose files are as good as one's own
    assert (kept.load() > 0) == is_root
    assert (loaded != []) == is_root


@pytest.mark.parametrize("outcome", ["refuses", "raises"])
def test_a_file_that_torch_cannot_read_is_a_warning(kept, monkeypatch, caplog, outcome):
    def load(artifacts):
        if outcome == "raises":
            raise KeyError("an artifact of a kind to come")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    with caplog.at_level(logging.WARNING):
        assert kept.load() == 0
    assert "is not used" in caplog.text


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path, loaded, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert ArtifactFile(tmp_path / "file", FACTS).save() == 0
    assert "not kept" in caplog.text


def test_a_write_that_fails_leaves_the_former_file(kept, monkeypatch):
    before = kept.path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert kept.save() == 0
    assert [path.read_bytes() for path in kept.path.parent.iterdir()] == [before]


def test_files_used_longest_ago_are_deleted(tmp_path, loaded):
    files = [ArtifactFile(tmp_path, {"n": str(n)}) for n in range(MAX_FILES + 2)]
    for age, file in enumerate(files[:MAX_FILES]):
        file.save()
        os.utime(file.path, (1000 + age, 1000 + age))
    assert files[0].load() > 0  # used now
    for file in files[MAX_FILES:]:
        file.save()
    gone = [number for number, file in enumerate(files) if not file.path.exists()]
    assert gone == [1, 2]


def test_only_the_user_may_read_what_is_run(kept):
    assert kept.path.stat().st_mode & 0o077 == 0
    assert kept.path.parent.stat().st_mode & 0o077 == 0


def test_facts_name_the_processor_and_what_it_can_do(monkeypatch, tmp_path):
    facts = machine_facts(torch.device("cpu"))
    assert facts["torch"] == torch.__version__
    assert set(facts) == {"processor", "torch", "cuda", "triton", "python"}
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(cache, "CPU_INFO", cpuinfo)
    seen = set()
    for flags in ("fpu avx2", "fpu avx2 avx512f"):
        cpuinfo.write_text(f"model name\t: An Example\nflags\t\t: {flags}\n\nmodel name : other\n")
        seen.add(machine_facts(torch.device("cpu"))["processor"])
    assert len(seen) == 2
    assert all(each.startswith("An Example ") for each in seen)
