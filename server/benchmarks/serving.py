"""A server with the fake pipeline on loopback, for benchmarks, from ready until the end."""

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READY_S = 60.0


@contextmanager
def served(
    folder: Path, *flags: str, model: str = "fake"
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The process and its port, once a worker is ready; ``folder`` is the data directory."""
    command = [sys.executable, "-m", "redux_server", "serve", "--model", model, "--port", "0"]
    command += ["--data-dir", str(folder), "--log-level", "warning", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        port = _port_of(process)
        _wait_ready(port)
        yield process, port
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _port_of(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(rb"127\.0\.0\.1:(\d+)", line):
            return int(found[1])
    raise SystemExit("the server ended")


def _wait_ready(port: int) -> None:
    ends_at = time.monotonic() + READY_S
    while time.monotonic() < ends_at:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
            return
        except OSError:  # not there yet, or an answer that it is not ready
            time.sleep(0.1)
    raise SystemExit(f"the server was not ready within {READY_S:g} s")
