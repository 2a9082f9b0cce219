"""A small HTTP server that speaks the wire contract as a test scripts it."""

import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from redux_server.parameters import PredictionRequest

KEY = "frs_of-the-test"
REQUEST = PredictionRequest(image="http://example.com/a.png")
TASK = "45b392b22c3b449fa935bd4dc2219dfe"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
RESULT = f"/api/v3/predictions/{TASK}/result"
STREAM = f"/api/v3/predictions/{TASK}/stream"


@dataclass(frozen=True)
class Stream:
    """Server-sent events; then the end of them, a cut in the middle, or silence (``is_held``)."""

    data: bytes
    is_cut: bool = False
    is_held: bool = False


class Stub(ThreadingHTTPServer):
    """Answers with ``script[path]``, one entry per call (the last one again and again)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.script: dict[str, list[tuple[int, Any, dict[str, str]]]] = {}
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.is_over = threading.Event()
        self.was_waited_out = False  # someone sat a silence out

    def answers(self, path: str, *entries: Any, status: int = 200, **headers: str) -> None:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        self.script.setdefault(path, []).extend((status, entry, fields) for entry in entries)

    def count(self, path: str) -> int:
        """How often this path was asked for."""
        return sum(where == path for _, where, _, _ in self.seen)

    def task(self, status: str, **more: Any) -> dict[str, Any]:
        data = {
            "id": TASK,
            "model": "wavespeed-ai/flux-pro-redux",
            "outputs": [],
            "urls": {"get": f"{self.url}/api/v3/predictions/{TASK}/result"},
            "has_nsfw_contents": [],
            "status": status,
            "error": "",
            "progress": {"step": 0, "total_steps": 28},
            **more,
        }
        return {"code": 200, "message": "success", "data": data}

    def completed(self, *, flags: tuple[bool, ...] = (False, False)) -> dict[str, Any]:
        outputs = [f"{self.url}/files/{i}.png" for i in range(len(flags))]
        for i in range(len(flags)):
            self.answers(f"/files/{i}.png", PNG + bytes([i]))
        seeds = list(range(7, 7 + len(flags)))
        return self.task("completed", outputs=outputs, has_nsfw_contents=list(flags), seeds=seeds)


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, self.path, headers, body))
        entries = self.server.script.get(self.path, [(404, {"message": "not here"}, {})])
        status, entry, extra = entries.pop(0) if len(entries) > 1 else entries[0]
        if isinstance(entry, Stream):
            self._send_stream(entry)
            return
        data = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _send_stream(self, stream: Stream) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        if stream.is_cut:
            self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(stream.data)
        self.wfile.flush()
        if stream.is_held and not self.server.is_over.wait(60):
            self.server.was_waited_out = True

    def log_message(self, *_: object) -> None:
        """Quiet."""
