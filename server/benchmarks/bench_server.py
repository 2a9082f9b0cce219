"""The server without a model: accepting, polling, claiming, starting, idling.

    make bench-server

Starts a server with the fake pipeline on loopback and prints JSON, also written to
bench-results/server.json. The load generator shares the machine with the server.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import platform
import re
import signal
import sqlite3
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from http_load import percentile, request, run_load
from PIL import Image
from serving import served

from redux_server import __version__
from redux_server.api.auth import KeyRing
from redux_server.database.migration import open_database
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
TARGETS = {
    "accepts_per_second": 500,
    "accept_p99_ms": 250,
    "polls_per_second": 2000,
    "submit_to_start_ms": 50,
    "api_rss_mb": 150,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accepts", type=int, default=4000)
    parser.add_argument("--polls", type=int, default=12000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--queued", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("bench-results/server.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as server:
        report = {
            "environment": _environment(),
            "targets": TARGETS,
            "idle": _idle(server),
            "start": _start_latency(server),
            "accepts": asyncio.run(_accepts(server, options)),
            "polls": asyncio.run(_polls(server, options)),
        }
    with tempfile.TemporaryDirectory() as folder:
        report["claim"] = _claim_latency(Path(folder), options.queued)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2)
    options.out.write_text(text + "\n")
    print(text)


class _Server:
    def __init__(self, process: subprocess.Popen[bytes], folder: Path, port: int) -> None:
        self.pid = process.pid
        self.folder = folder
        self.port = port
        self.key = KeyRing(open_database(f"sqlite:///{folder}/tasks.db")).create("bench")
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        self.worker_pid = int(children[0])

    def call(self, method: str, path: str, body: Any = None) -> Any:
        message = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(message) as answer:
            return json.load(answer)

    @contextmanager
    def paused_worker(self) -> Iterator[None]:
        """Stop the worker, whose image decoding would compete with the API for the cores."""
        os.kill(self.worker_pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.worker_pid, signal.SIGCONT)


@contextmanager
def _server(folder: Path) -> Iterator[_Server]:
    with served(folder, "--max-queue", "1000000") as (process, port):
        yield _Server(process, folder, port)


def _idle(server: _Server) -> dict[str, float]:
    """CPU and memory of the API process with nothing to do, over ten seconds."""
    time.sleep(3)  # the end of starting up
    before = _cpu_seconds(server.pid)
    time.sleep(10)
    used = _cpu_seconds(server.pid) - before
    return {"api_cpu_percent": round(used * 10, 2), "api_rss_mb": _rss_mb(server.pid)}


def _start_latency(server: _Server, count: int = 50) -> dict[str, float]:
    """From accepting to a worker's claim, and to the end, one task at a time."""
    body = {"image": _picture(), "size": "512*512"}
    for _ in range(count):
        task_id = server.call("POST", SUBMIT, body)["data"]["id"]
        path = f"/api/v3/predictions/{task_id}/result"
        while (state := server.call("GET", path)["data"])["status"] != "completed":
            if state["error"]:
                raise RuntimeError(state["error"])
            time.sleep(0.02)
        time.sleep(0.05)
    query = "SELECT created_at, started_at, finished_at FROM tasks"
    with closing(sqlite3.connect(server.folder / "tasks.db")) as db:
        rows = db.execute(query).fetchall()
    starts = [(started - created) * 1000 for created, started, _ in rows]
    ends = [(finished - created) * 1000 for created, _, finished in rows]
    return {
        "submit_to_start_p50_ms": percentile(starts, 50),
        "submit_to_start_p99_ms": percentile(starts, 99),
        "submit_to_end_p50_ms": percentile(ends, 50),
    }


def _picture() -> str:
    """A small photo-sized picture as base64."""
    buffer = io.BytesIO()
    Image.effect_noise((512, 512), 60).convert("RGB").save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


async def _accepts(server: _Server, options: argparse.Namespace) -> dict[str, Any]:
    """Durable accepts, with the worker paused and with it working beside."""
    body = json.dumps({"image": "http://127.0.0.1:9/a.png", "size": "512*512"}).encode()
    message = request("POST", SUBMIT, server.key, body)
    report = {}
    with server.paused_worker():
        load = await run_load(
            server.port,
            itertools.repeat(message, options.accepts),
            connections=options.connections,
            keep_bodies=True,
        )
        server.ids = [json.loads(answer)["data"]["id"] for answer in load.bodies]
        report["worker_paused"] = load.summary()
    load = await run_load(
        server.port,
        itertools.repeat(message, options.accepts),
        connections=options.connections,
    )
    report["worker_working"] = load.summary()
    return report


async def _polls(server: _Server, options: argparse.Namespace) -> dict[str, float]:
    """Polls of distinct tasks, the worker paused."""
    paths = (f"/api/v3/predictions/{i}/result" for i in itertools.cycle(server.ids))
    messages = (request("GET", path, server.key) for path in paths)
    with server.paused_worker():
        load = await run_load(
            server.port,
            itertools.islice(messages, options.polls),
            connections=options.connections,
        )
    return {**load.summary(), "api_rss_mb_after": _rss_mb(server.pid)}


def _claim_latency(folder: Path, queued: int, count: int = 500) -> dict[str, float]:
    """Claims on a store with a long queue, of fifty API keys."""
    store = TaskStore(open_database(f"sqlite:///{folder}/tasks.db"))
    for _ in range(0, queued, 5000):
        new = [NewTask(f"key-{number % 50}", "model", {}) for number in range(5000)]
        store.accept(new, max_open=queued)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        store.claim("bench")
        times.append((time.perf_counter() - started) * 1000)
    return {"queued": queued, "p50_ms": percentile(times, 50), "p99_ms": percentile(times, 99)}


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return round(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024, 1)


def _environment() -> dict[str, Any]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ("fastapi", "uvicorn", "sqlalchemy", "uvloop", "httptools")
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "packages": {"flux-redux-server": __version__, **{p: version(p) for p in packages}},
    }


if __name__ == "__main__":
    main()
