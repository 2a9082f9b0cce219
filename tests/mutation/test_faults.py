"""The list of faults fits the code as it is, and a fault that nobody notices is found."""

import re
from collections import Counter
from pathlib import Path

import pytest

from mutation import run
from mutation.faults import FAULTS, Fault
from mutation.run import ROOT, plant


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_can_be_planted_and_leaves_sound_python(fault: Fault) -> None:
    source = (ROOT / fault.path).read_text()
    assert source.count(fault.text) == 1
    spoiled = source.replace(fault.text, fault.spoiled)
    assert spoiled != source
    compile(spoiled, fault.path, "exec")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_names_tests_that_there_are(fault: Fault) -> None:
    for node_id in fault.node_ids:
        file, _, name = node_id.partition("::")
        assert re.search(rf"def {name or 'test_'}", (ROOT / file).read_text())


def test_faults_have_names_of_their_own_and_cover_the_promises() -> None:
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1
    promises = {fault.promise for fault in FAULTS}
    assert promises == {
        *("accept", "claim", "lease", "finish", "webhooks", "files", "signing", "keys"),
        *("confinement", "addresses"),
    }
    assert not promises & {fault.name for fault in FAULTS}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A module, and tests of which one looks at half of what it does."""
    (tmp_path / "server/redux_server").mkdir(parents=True)
    (tmp_path / "server/redux_server/sums.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "tests/server").mkdir(parents=True)
    start = "import sys; sys.path.insert(0, 'server/redux_server')\nfrom sums import add\n"
    (tmp_path / "tests/server/test_good.py").write_text(
        start + "def test_sum():\n    assert add(2, 3) == 5\n"
    )
    (tmp_path / "tests/server/test_blind.py").write_text(
        start + "def test_sum():\n    assert add(2, 2) == 4\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def a_fault(spoiled: str, *tests: str, text: str = "a + b") -> Fault:
    return Fault("sums", "a-fault", "sums.py", text, spoiled, tests)


def test_who_survives_is_told_and_the_file_is_as_it_was(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = project / "server/redux_server/sums.py"
    before = file.read_text()
    assert run.survivors([a_fault("a * b", "test_good.py")], project) == []
    assert run.survivors([a_fault("a * b", "test_blind.py")], project) == ["a-fault"]
    assert run.survivors([a_fault("a * b", "test_none.py")], project) == ["a-fault"]
    assert file.read_text() == before
    out = capsys.readouterr().out
    assert re.findall(r"^(noticed|SURVIVED|pytest exit 4 without)", out, re.M) == [
        *("noticed", "SURVIVED", "pytest exit 4 without")
    ]


def test_tests_that_fail_by_themselves_notice_nothing(project: Path) -> None:
    (project / "tests/server/test_bad.py").write_text("def test_sum():\n    assert False\n")
    assert run.survivors([a_fault("a * b", "test_bad.py")], project) == ["a-fault"]


@pytest.mark.parametrize("text", ["a - b", "a"])
def test_edit_that_does_not_fit_is_an_error(project: Path, text: str) -> None:
    with pytest.raises(ValueError, match="not once"):
        plant(a_fault("x", text=text), project)


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["no-such-fault"])
    assert "no such fault: no-such-fault" in capsys.readouterr().err
