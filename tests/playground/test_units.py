"""The modules of the page that need no browser, by node's own test runner."""

import re
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parent / "units"
PLAYGROUND = Path(__file__).resolve().parents[2] / "server/redux_server/playground"


def test_units_pass_in_node() -> None:
    driver = pytest.importorskip("playwright._impl._driver")
    node, _ = driver.compute_driver_executable()
    done = subprocess.run(
        [node, "--test", "--test-reporter=tap", *map(str, UNITS.glob("*.mjs"))],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    counted = re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE)
    assert counted and int(counted[1]) > 10


def test_page_is_small_and_names_no_other_host() -> None:
    import gzip

    files = [path for path in PLAYGROUND.iterdir() if path.is_file()]
    assert sum(len(gzip.compress(path.read_bytes(), 9)) for path in files) <= 100_000
    for path in files:
        named = set(re.findall(r"https?://(\w[\w.-]+)", path.read_text()))
        assert named <= {"www.w3.org", "example.com"}, path  # a namespace, and an example


def test_markup_has_no_inline_script_or_style() -> None:
    page = (PLAYGROUND / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)[^>]*>|<style|\sstyle=|\son\w+=", page) == []
