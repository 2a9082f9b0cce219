"""Compiled code is found again on the same kind of machine, and no one else's is ever run."""

import logging
import os

import pytest
import torch
from torch._inductor import codecache

from redux_pipelines.compilation import cache
from redux_pipelines.compilation.cache import MAX_FOLDERS, CodeFolder, kept_code, machine_facts

FACTS = {"processor": "a", "torch": "2"}


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")


def in_use():
    return os.environ["TORCHINDUCTOR_CACHE_DIR"]


@pytest.fixture
def kept(tmp_path):
    """A folder in which torch left something."""
    folder = CodeFolder(tmp_path / "new" / "compile", FACTS)
    assert folder.use()
    (folder.path / "fxgraph").mkdir()
    (folder.path / "fxgraph" / "code").write_bytes(bytes(1000))
    return folder


def test_torch_itself_reads_and_writes_the_folder(kept):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == str(kept.path)


def test_the_next_start_finds_what_was_kept(kept):
    assert CodeFolder(kept.path.parent, dict(reversed(FACTS.items()))).use()
    assert in_use() == str(kept.path)
    assert (kept.path / "fxgraph" / "code").exists()


@pytest.mark.parametrize("name", FACTS)
def test_another_fact_is_another_folder(kept, name):
    other = CodeFolder(kept.path.parent, {**FACTS, name: "other"})
    assert other.use()
    assert in_use() == str(other.path) != str(kept.path)


def test_only_the_user_may_enter_what_is_run(kept):
    assert kept.path.stat().st_mode & 0o077 == 0
    assert kept.path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
@pytest.mark.parametrize("level", ["network", "all"])
def test_a_folder_that_others_may_write_to_is_not_used(kept, caplog, mode, level):
    (kept.path if level == "network" else kept.path.parent).chmod(mode)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = "before"
    with caplog.at_level(logging.WARNING):
        assert not kept.use()
    assert in_use() == "before"
    assert f"{kept.path}: others could have written to it" in caplog.text


def test_a_folder_of_another_user_is_not_used(kept, monkeypatch):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = "before"
    monkeypatch.setattr(os, "getuid", lambda: kept.path.stat().st_uid + 1)
    is_root = kept.path.stat().st_uid == 0  # whose folders are as good as one's own
    assert kept.use() == is_root
    assert (in_use() != "before") == is_root


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert not CodeFolder(tmp_path / "file", FACTS).use()
    assert in_use() == "before"
    assert "not kept" in caplog.text


def test_what_is_discarded_is_gone_and_the_place_is_usable(kept):
    kept.discard()
    assert not kept.path.exists()
    assert kept.use()
    assert list(kept.path.rglob("code")) == []


def test_folders_used_longest_ago_are_deleted(tmp_path):
    folders = [CodeFolder(tmp_path, {"n": str(n)}) for n in range(MAX_FOLDERS + 2)]
    for age, folder in enumerate(folders[:MAX_FOLDERS]):
        folder.use()
        os.utime(folder.path, (1000 + age, 1000 + age))
    folders[0].use()  # used now
    for folder in folders[MAX_FOLDERS:]:
        folder.use()
    gone = [number for number, folder in enumerate(folders) if not folder.path.exists()]
    assert gone == [1, 2]


def test_only_folders_of_ours_and_files_of_former_versions_are_deleted(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "0123456789ab.bin").write_bytes(b"packed by a former version")
    for number in range(MAX_FOLDERS + 1):
        CodeFolder(tmp_path, {"n": str(number)}).use()
    assert (tmp_path / "mine").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["notes.txt"]


def test_what_is_kept_says_what_it_was_made_on_and_how_large_it_is(kept):
    (kept.path.parent / "foreign").mkdir()
    for name, text in (("junk", "\x00 no facts"), ("list", "[1, 2]")):
        (kept.path.parent / name).mkdir()
        (kept.path.parent / name / "facts.json").write_text(text)
    (found,) = kept_code(kept.path.parent)
    assert (found.path, found.facts) == (kept.path, FACTS)
    assert 1000 < found.size_bytes < 1100


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


def test_headers_that_torch_compiles_first_are_kept_for_all_networks(tmp_path, monkeypatch):
    """Not in the temporary folder, which a worker has a new one of at each start."""
    for name in ("_HEADER_DIR", "_HEADER_LOCK_DIR"):
        monkeypatch.setattr(codecache, name, "before", raising=False)
    for number in range(2):
        assert CodeFolder(tmp_path / "compile", {"n": str(number)}).use()
        assert str(tmp_path / "headers") == codecache._HEADER_DIR
        assert str(tmp_path / "headers" / "locks") == codecache._HEADER_LOCK_DIR
    assert (tmp_path / "headers").stat().st_mode & 0o777 == 0o700


def test_headers_that_others_could_have_written_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(codecache, "_HEADER_DIR", "before", raising=False)
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers").chmod(0o777)
    assert not CodeFolder(tmp_path / "compile", FACTS).use()
    assert codecache._HEADER_DIR == "before"
