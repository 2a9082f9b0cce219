"""``flux-redux submit --wait`` against a live server: followed, or as something in between lets it.

In between stands a proxy that treats streams badly; everything else passes.
"""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from e2e.live import LiveServer
from redux_server.cli import client, main
from threaded import answering

FLAGS = ("--size", "512*512", "--seed", "7", "--num-images", "2", "--wait")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A live server whose tasks take more than half a second: 28 steps of 20 ms."""
    data_dir = tmp_path_factory.mktemp("slow") / "data"
    with LiveServer(data_dir, "--fetch-allow", "127.0.0.1:*", model="fake-slow") as server:
        yield server


class Meddler(ThreadingHTTPServer):
    """Passes everything on to ``port`` but streams, which it treats as ``kind`` says."""

    daemon_threads = True

    def __init__(self, port: int, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = port
        self.kind = kind
        self.polls = 0
        self.streams = 0
        self.is_over = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Meddler

    def do_GET(self) -> None:
        is_stream = self.path.endswith("/stream")
        self.server.streams += is_stream
        self.server.polls += self.path.endswith("/result")
        if is_stream and self.server.kind == "missing":
            self.send_error(404)
        else:
            self._pass_on(is_stream and self.server.kind)

    def do_POST(self) -> None:
        self._pass_on("")

    def _pass_on(self, kind: "str | bool") -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        try:
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            self.send_response(answer.status)
            for name in ("Content-Type", "Content-Length"):
                if value := answer.headers.get(name):
                    self.send_header(name, value)
            if kind == "cut":
                self.send_header("Content-Length", "100000")
            self.end_headers()
            if kind == "cut":
                while not (line := answer.readline()).startswith(b"data:"):
                    self.wfile.write(line)
                self.wfile.write(line[: len(line) // 2])
            elif kind == "kept back":
                self.server.is_over.wait(60)
            else:
                while part := answer.read1(65536):
                    self.wfile.write(part)
        finally:
            behind.close()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def meddler(port: int, kind: str) -> Iterator[Meddler]:
    with answering(Meddler(port, kind)) as server:
        try:
            yield server
        finally:
            server.is_over.set()


def submit(url: str, key: str, image: str, folder: Path) -> list[bytes]:
    """The pictures that it saved."""
    given = ("--url", url, "--key", key, "-o", str(folder))
    assert main.run(["submit", image, *FLAGS, *given]) == 0
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_it_follows_the_server(slow: LiveServer, site: str, tmp_path: Path) -> None:
    with meddler(slow.port, "passed") as between:
        url = f"http://127.0.0.1:{between.server_address[1]}"
        pictures = submit(url, slow.key, f"{site}/photo.jpg", tmp_path)
    assert len(pictures) == 2
    assert pictures[0] != pictures[1]
    assert (between.streams, between.polls) == (1, 0)


@pytest.mark.parametrize("kind", ["missing", "cut", "kept back"])
def test_the_result_is_the_same_without_a_whole_stream(
    slow: LiveServer, site: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE_S", 0.5)
    image = f"{site}/photo.jpg"
    wanted = submit(slow.base_url, slow.key, image, tmp_path / "followed")
    with meddler(slow.port, kind) as between:
        url = f"http://127.0.0.1:{between.server_address[1]}"
        assert submit(url, slow.key, image, tmp_path / kind) == wanted
    assert between.streams >= 1
    assert between.polls >= 1
