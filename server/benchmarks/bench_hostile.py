"""One API key that means no good: what others notice of it, and what it costs in memory and time.

    make bench-hostile

Starts servers with the fake pipeline on loopback and prints JSON, also written to
bench-results/hostile.json. `fairness` is what tasks of one key take, alone and beside a hostile key
of each kind; `livez` how long the event loop was kept, by the shape of what came; `memory` the
resident memory of the API process under many connections with large bodies. The clients share the
machine with the server.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from http_load import percentile
from PIL import Image
from serving import served

from redux_server import __version__
from redux_server.api.auth import KeyRing
from redux_server.database.migration import open_database

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
FORM = "/api/v3/media/upload/binary"
TARGETS = {"p95_ratio": 2.0, "livez_ms": 100, "api_rss_mib": 250}
MIB = 2**20
STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("fairness", "livez", "memory"), default="")
    parser.add_argument("--tasks", type=int, default=40, help="of the key that is measured")
    parser.add_argument("--connections", type=int, default=200, help="with bodies of 20 MiB")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the trial of memory")
    parser.add_argument("--out", type=Path, default=Path("bench-results/hostile.json"))
    options = parser.parse_args()
    report: dict[str, Any] = {"environment": _environment(), "targets": TARGETS}
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "fairness": fairness,
        "livez": livez,
        "memory": memory,
    }
    for name, measure in parts.items():
        if options.only in ("", name):
            report[name] = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2)
    options.out.write_text(text + "\n")
    print(text)


class Server:
    """A server of its own, with a key for the one that is measured and one for the other."""

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path, port: int) -> None:
        self.pid, self.port = process.pid, port
        ring = KeyRing(open_database(f"sqlite:///{folder}/tasks.db"))
        self.mine, self.hostile = ring.create("measured"), ring.create("hostile")

    def call(self, method: str, path: str, key: str = "", body: Any = None, **more: str) -> Any:
        """Status and data of one request."""
        headers = {**more, **({"Authorization": f"Bearer {key}"} if key else {})}
        if isinstance(body, dict):
            body, headers["Content-Type"] = json.dumps(body), "application/json"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def submit(self, key: str, **parameters: Any) -> Any:
        """Status and data of a submit."""
        body = {"image": SMALL, "num_inference_steps": STEPS, "size": "512*512", **parameters}
        status, text = self.call("POST", SUBMIT, key, body)
        return status, json.loads(text)

    def rss_mib(self) -> float:
        """Resident memory of the API process."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return round(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024, 1)


@contextmanager
def serving(*flags: str, model: str = "fake-slow") -> Iterator[Server]:
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder), *flags, model=model) as (process, port),
    ):
        yield Server(process, Path(folder), port)


class Beside:
    """Runs hostile clients in threads until it is left, and measures ``/livez`` meanwhile."""

    def __init__(self, server: Server, *clients: Callable[["Beside"], None]) -> None:
        self.server = server
        self.is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in clients]
        self._threads.append(threading.Thread(target=self._ping))
        self._livez_ms: list[float] = []

    def __enter__(self) -> "Beside":
        """Start."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and wait for all."""
        self.is_over.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, client: Callable[["Beside"], None]) -> None:
        while not self.is_over.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                client(self)

    def _ping(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        while not self.is_over.is_set():
            started = time.perf_counter()
            try:
                connection.request("GET", "/livez")
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                connection.close()
                continue
            self._livez_ms.append((time.perf_counter() - started) * 1000)
            time.sleep(0.01)
        connection.close()

    def livez(self) -> dict[str, float]:
        """How long ``/livez`` took."""
        times = self._livez_ms or [0.0]
        return {"p99_ms": percentile(times, 99), "max_ms": percentile(times, 100)}


# --- fairness -------------------------------------------------------------------------------------


def fairness(options: argparse.Namespace) -> dict[str, Any]:
    """What a task takes from submit to its end, of a key with one at a time."""
    silent = _silent_host()
    kinds: dict[str, list[Callable[[Beside], None]]] = {
        "alone": [],
        "queue": [_flood] * 2,
        "slow_host": [lambda beside: _fetch_from(beside, silent)],
        "uploads": [_upload] * 2,
        "held_bodies": [_hold_body] * 8,
    }
    report: dict[str, Any] = {"tasks": options.tasks, "steps": STEPS}
    for kind, clients in kinds.items():
        flags = ("--fetch-allow", "127.0.0.1", "--max-queue", "60", "--max-stored-uploads", "100")
        with serving(*flags) as server, Beside(server, *clients) as beside:
            time.sleep(3 if clients else 0.5)
            times = [_task_ms(server) for _ in range(options.tasks)]
        report[kind] = {
            "p50_ms": percentile(times, 50),
            "p95_ms": percentile(times, 95),
            "p95_ratio": 1.0,
            "livez": beside.livez(),
        }
        report[kind]["p95_ratio"] = round(report[kind]["p95_ms"] / report["alone"]["p95_ms"], 2)
        print(kind, report[kind], file=sys.stderr)
    return report


def _task_ms(server: Server) -> float:
    started = time.perf_counter()
    status, answer = server.submit(server.mine)
    while status == 429:
        time.sleep(0.05)
        status, answer = server.submit(server.mine)
    path = f"/api/v3/predictions/{answer['data']['id']}/result"
    while json.loads(server.call("GET", path, server.mine)[1])["data"]["status"] != "completed":
        time.sleep(0.01)
    return (time.perf_counter() - started) * 1000


def _flood(beside: Beside) -> None:
    if beside.server.submit(beside.server.hostile)[0] != 200:
        time.sleep(0.05)


def _silent_host() -> int:
    """The port of a host that takes connections and never answers."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=200)
    kept = []

    def accept() -> None:
        while True:
            kept.append(listener.accept())

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def _fetch_from(beside: Beside, port: int) -> None:
    url = f"http://127.0.0.1:{port}/a.png"
    if beside.server.submit(beside.server.hostile, image=url)[0] != 200:
        time.sleep(0.05)


def _upload(beside: Beside) -> None:
    status = beside.server.call("POST", FORM, beside.server.hostile, UPLOAD, **UPLOAD_TYPE)[0]
    if status != 200:
        time.sleep(0.05)


def _hold_body(beside: Beside) -> None:
    with _half_sent(beside.server) as connection:
        beside.is_over.wait(10)
        connection.close()


@contextmanager
def _half_sent(server: Server) -> Iterator[socket.socket]:
    """A submit of 20 MiB whose last byte does not come."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST {SUBMIT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.hostile}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(LARGE) + 1}\r\n\r\n"
        connection.sendall(head.encode())
        connection.sendall(LARGE)
        yield connection


# --- time -----------------------------------------------------------------------------------------


def livez(_: argparse.Namespace) -> dict[str, Any]:
    """How long ``/livez`` takes while bodies of each shape come one after another."""
    with serving(model="fake") as server:
        report = {}
        for name, body in {"nothing": b"", **shapes()}.items():

            def send(beside: Beside, body: bytes = body) -> None:
                if not body:
                    time.sleep(0.1)
                    return
                kind = {"Content-Type": "application/json"}
                beside.server.call("POST", SUBMIT, beside.server.hostile, body, **kind)

            with Beside(server, send) as beside:
                time.sleep(2)
            report[name] = beside.livez()
            print(name, report[name], file=sys.stderr)
    return report


def shapes() -> dict[str, bytes]:
    """Bodies that are long, deep, wide or repeated."""
    return {
        "long": b'{"image": "' + b"A" * (20 * MIB) + b'"}',
        "long in other parameters": b'{"image": "a", "prompt": "' + b"x" * (20 * MIB) + b'"}',
        "deep": b'{"image": ' + b"[" * (120 * 1024) + b"]" * (120 * 1024) + b"}",
        "wide": b'{"image": "a", "x": [' + b"1," * (100 * 1024) + b"1]}",
        "names": b"{" + b",".join(b'"k%d": 1' % each for each in range(20_000)) + b"}",
        "quotes": b'{"image": "' + b'\\"' * (60 * 1024) + b'"}',
        "backslashes": b'{"image": "' + b"\\\\" * (10 * MIB) + b'"}',
        "numbers": b'{"image": "a", "seed": ' + b"9" * (200 * 1024) + b"}",
        "data URI": b'{"image": "data:' + b";a=b" * (5 * MIB) + b',"}',
        "picture": LARGE + b"}",
    }


# --- memory ---------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """The API's resident memory while ``connections`` send and read what is large."""
    with serving("--max-queue", "1000", model="fake") as server:
        before = server.rss_mib()
        outputs = _outputs(server)
        kinds: list[Callable[[Beside], None]] = [
            lambda beside: _send_picture(beside.server),
            _hold_body,
            _upload,
            lambda beside: _read_slowly(beside, outputs),
            lambda beside: _sync(beside.server),
        ]
        clients = [kinds[number % len(kinds)] for number in range(options.connections)]
        samples = []
        with Beside(server, *clients):
            started = time.perf_counter()
            while (now := time.perf_counter() - started) < options.seconds:
                samples.append((round(now, 1), server.rss_mib()))
                time.sleep(0.25)
        time.sleep(3)
        after = server.rss_mib()
    report = {
        "connections": options.connections,
        "seconds": options.seconds,
        "rss_mib_before": before,
        "rss_mib_peak": max(rss for _, rss in samples),
        "rss_mib_after": after,
        "rss_mib": samples[:: max(1, len(samples) // 60)],
    }
    print({name: each for name, each in report.items() if name != "rss_mib"}, file=sys.stderr)
    return report


def _outputs(server: Server) -> list[str]:
    """Paths of some finished tasks that answer with their images in base64."""
    paths = []
    for seed in range(4):
        how = {"enable_base64_output": True, "size": "1536*1536", "num_images": 4, "seed": seed}
        _, answer = server.submit(server.mine, **how)
        paths.append(f"/api/v3/predictions/{answer['data']['id']}/result")
    for path in paths:
        while json.loads(server.call("GET", path, server.mine)[1])["data"]["status"] != "completed":
            time.sleep(0.1)
    return paths


def _send_picture(server: Server) -> None:
    kind = {"Content-Type": "application/json"}
    if server.call("POST", SUBMIT, server.mine, LARGE + b"}", **kind)[0] != 200:
        time.sleep(0.2)


def _read_slowly(beside: Beside, paths: list[str]) -> None:
    """Ask for images in base64, and read 64 KiB of the answer each tenth of a second."""
    server = beside.server
    path = paths[threading.get_ident() % len(paths)]
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.mine}\r\n\r\n"
        connection.sendall(head.encode())
        connection.settimeout(20)
        for _ in range(100):
            if beside.is_over.is_set() or not connection.recv(64 * 1024):
                return
            time.sleep(0.1)


def _sync(server: Server) -> None:
    how = {"enable_base64_output": True, "enable_sync_mode": True, "size": "1024*1024"}
    if server.submit(server.mine, **how)[0] != 200:
        time.sleep(0.2)


# --- what is sent ---------------------------------------------------------------------------------


def _png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG")
    return buffer.getvalue()


SMALL = base64.b64encode(_png(64, 64)).decode()
_PICTURE = _png(64, 64) + os.urandom(15 * MIB)
LARGE = b'{"image": "' + base64.b64encode(_PICTURE) + b'"'
"""A submit of 20 MiB but for its last byte."""
UPLOAD = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    + _PICTURE
    + b"\r\n--b--\r\n"
)
UPLOAD_TYPE = {"Content-Type": "multipart/form-data; boundary=b"}


def _environment() -> dict[str, Any]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "flux-redux-server": __version__,
    }


if __name__ == "__main__":
    main()
