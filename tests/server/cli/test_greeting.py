"""What ``serve`` tells a person, at once and when it is ready."""

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.live import LiveServer, wait_until
from redux_server.api.services import Services
from redux_server.cli import greeting as module
from redux_server.cli.greeting import Greeting
from redux_server.dispatch.presence import WorkerState


@pytest.fixture
def has_ended() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def greet(services: Services, port: int = 8123) -> Greeting:
    return Greeting(services.settings, services, port)


def test_the_first_start_makes_a_key_when_it_can_be_used(
    build_services: Callable[..., Services],
    capsys: pytest.CaptureFixture[str],
    has_ended: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    services, is_started = build_services(), threading.Event()
    greeting = greet(services)
    greeting.begin()
    assert "starts on http://127.0.0.1:8123 with the model fake" in capsys.readouterr().out
    greeting.follow(is_started.is_set, has_ended)
    services.presence.announce("w", "cpu", WorkerState.READY)
    time.sleep(0.1)
    assert services.keys.is_empty() and capsys.readouterr().out == ""
    is_started.set()
    wait_until(lambda: not services.keys.is_empty(), 10)
    told: list[str] = []

    def is_told() -> bool:
        told.append(capsys.readouterr().out)
        return "Ctrl-C" in "".join(told)

    wait_until(is_told, 10)
    text = "".join(told)
    (key,) = set(re.findall(r"frs_[\w-]+", text))
    assert services.keys.recognise(key)
    assert "\nReady: http://127.0.0.1:8123\n" in text
    assert "http://127.0.0.1:8123/docs" in text


def test_a_line_can_be_pasted_as_it_is(build_services: Callable[..., Services]) -> None:
    services = build_services()
    text = greet(services).text()
    (line,) = re.findall(r"^  try +(.*)$", text, re.MULTILINE)
    words = shlex.split(line)
    assert words[:2] == ["curl", "-s"]
    (key,) = re.findall(r"frs_[\w-]+", line)
    assert services.keys.recognise(key)
    (sample,) = re.findall(r"http://127.0.0.1:8123(/files/[^\"]+)", line)
    blob = services.signer.key_of("http://127.0.0.1:8123" + sample)
    assert blob is not None and services.blobs.get(blob)


def test_a_later_start_says_how_to_make_a_key(build_services: Callable[..., Services]) -> None:
    services = build_services()
    services.keys.create("mine")
    text = greet(services).text()
    assert "frs_" not in text and "$FLUX_REDUX_KEY" in text
    assert f"keys create --name me --data-dir {services.settings.data_dir}" in text
    assert "none is ready" in text  # no worker is, and this is a start without


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({"host": "0.0.0.0"}, "http://127.0.0.1:8123"),
        ({"host": "::"}, "http://[::1]:8123"),
        ({"host": "::1"}, "http://[::1]:8123"),
        ({"host": "10.1.2.3"}, "http://10.1.2.3:8123"),
        ({"public_url": "https://flux.example.com/"}, "https://flux.example.com"),
    ],
)
def test_the_address_is_one_that_can_be_opened(
    build_services: Callable[..., Services], settings: dict[str, str], url: str
) -> None:
    assert greet(build_services(**settings)).url == url


def test_the_program_is_named_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "flux-redux"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert module._program() == "./flux-redux"
    monkeypatch.chdir("/")
    assert module._program() == f".{script}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module._program() == "flux-redux"
    monkeypatch.setattr(sys, "argv", ["/x/redux_server/__main__.py"])
    assert module._program().endswith(" -m redux_server")


def test_a_terminal_shows_text_and_how_to_go_on(tmp_path: Path) -> None:
    """``serve`` on a pseudo-terminal, until Ctrl-C."""
    server = LiveServer(tmp_path / "data")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "redux_server", "serve", *server._arguments()],
        stdin=theirs, stdout=theirs, stderr=theirs, env=server._environment(), cwd=tmp_path,
    )  # fmt: skip
    os.close(theirs)
    seen = ""
    try:
        while "Ctrl-C" not in seen:
            seen += os.read(ours, 65_536).decode()  # ends with an error when the server does
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        os.close(ours)
    assert f"Ready: {server.base_url}" in seen and f"{server.base_url}/docs" in seen
    assert "worker ready" in seen and '{"event"' not in seen and '"event":' not in seen
