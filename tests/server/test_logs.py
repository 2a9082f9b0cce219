"""Shapes of log lines: for people on a terminal, as JSON for everything else."""

import json
import os
import pty
import subprocess
import sys

import pytest

CODE = """
import sys, structlog
from redux_server import logs
logs.configure(format_=sys.argv[1], level="info")
structlog.get_logger("redux_server.x").info("worker ready", device="cpu")
"""


def piped(format_: str) -> str:
    command = [sys.executable, "-c", CODE, format_]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def on_a_terminal(format_: str) -> str:
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-c", CODE, format_]
        subprocess.run(command, stderr=theirs, stdout=theirs, check=True)
        return os.read(ours, 65_536).decode()
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("format_", ["auto", "json"])
def test_lines_that_nobody_watches_are_json(format_: str) -> None:
    line = json.loads(piped(format_))
    assert (line["event"], line["device"], line["level"]) == ("worker ready", "cpu", "info")
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize("format_", ["auto", "text"])
def test_lines_on_a_terminal_are_for_people(format_: str) -> None:
    line = on_a_terminal(format_)
    assert "worker ready" in line and "\x1b[" in line and "{" not in line


def test_who_asks_for_a_shape_gets_it() -> None:
    assert json.loads(on_a_terminal("json"))["event"] == "worker ready"
    text = piped("text")
    assert "worker ready" in text and "\x1b[" not in text and "{" not in text
