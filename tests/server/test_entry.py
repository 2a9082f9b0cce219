"""The command's entry: what it sets before any verb is imported."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A verb that loads OpenMP as torch does, by way of each entry: it says itself what it was told.
VERB = """
import sys
from redux_server.cli import main
def run(arguments):
    assert "torch" not in sys.modules
    import torch
    return 0
main.run = run
"""
ENTRIES = {
    "python -m redux_server": "import runpy; runpy.run_module('redux_server', run_name='__main__')",
    "flux-redux": "from redux_server.__main__ import main; sys.exit(main())",
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("given", "told"), [("", "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_openmp_waits_passively_whatever_verb_computes(
    entry: str, given: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "true")
    done = subprocess.run(
        [sys.executable, "-c", VERB + ENTRIES[entry]], capture_output=True, text=True, check=True
    )
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("this torch has another OpenMP, which does not say what it was told")
    assert f"OMP_WAIT_POLICY = '{told}'" in done.stderr


def test_there_are_no_other_entries() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"flux-redux": "redux_server.__main__:main"}
