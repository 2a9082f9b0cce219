"""What is gathered for a machine offline: all that the report imports, nothing that is there."""

import re
from importlib.metadata import requires
from types import SimpleNamespace

import pytest
from gpu_report import bundle, served
from gpu_report.paths import ROOT
from packaging.requirements import Requirement


def test_all_that_the_report_needs_is_gathered_or_there():
    lacking = bundle.lacking("3.12")
    assert {"diffusers", "sqlalchemy", "fastapi", "pydantic", "importlib-metadata"} <= lacking
    assert not lacking & {"torch", "triton", "transformers", "numpy", "pillow", "tokenizers"}
    ends = bundle.closure(bundle.THERE, "3.12") | lacking
    for need in map(Requirement, requires("diffusers") or ()):
        if need.marker is None:
            assert bundle.canonicalize_name(need.name) in ends


def test_all_that_the_server_stage_asks_for_is_gathered():
    there = bundle.closure(bundle.THERE, "3.12")  # some transformers bring httpx, and httpcore
    names = {name.replace("-", "_") for name in (*bundle.lacking("3.12"), *there)}
    renamed = {"multipart": "python_multipart"}
    assert {renamed.get(name, name) for name in served.NEEDED} <= names


def test_markers_are_those_of_the_other_python_and_extras_count_if_asked_for(monkeypatch):
    needs = {
        "one": ['old; python_version < "3.13"', "two[fast]", 'dev; extra == "dev"'],
        "two": ['speed; extra == "fast"'],
    }
    monkeypatch.setattr(
        bundle, "distribution", lambda name: SimpleNamespace(requires=needs.get(name))
    )
    assert bundle.closure(("one",), "3.12") == {"one", "old", "two", "speed"}
    assert bundle.closure(("one",), "3.13") == {"one", "two", "speed"}


def test_an_unknown_package_has_no_needs():
    assert bundle.closure(("no-such-package-anywhere",), "3.12") == set()


def test_a_pure_wheel_is_preferred_and_the_message_says_if_there_is_none(tmp_path, monkeypatch):
    tried = []

    def pip(command, **_):
        tried.append("pure" if "any" in command else "linux")
        if tried[-1] == "linux" and "good" in command[-1]:
            (folder,) = (command[i + 1] for i, each in enumerate(command) if each == "-d")
            (bundle.Path(folder) / "good-1-cp312-cp312-linux.whl").write_bytes(b"wheel")
        code = 0 if tried[-1] == "linux" and "good" in command[-1] else 1
        return bundle.subprocess.CompletedProcess(command, code, "", "no matching distribution")

    monkeypatch.setattr(bundle.subprocess, "run", pip)
    assert bundle.download("good==1", "3.12", tmp_path).read_bytes() == b"wheel"
    assert tried == ["pure", "linux"]
    with pytest.raises(SystemExit, match=r"no wheel of bad==1 for Python .*: no matching"):
        bundle.download("bad==1", "3.12", tmp_path)


def test_git_ignores_the_bundle():
    assert re.search(r"^/gpu-bundle/$", (ROOT / ".gitignore").read_text(), re.MULTILINE)
