"""What 1,000 open tasks cost the process of `flux-redux bench`: memory and processor time.

    make bench-open-tasks

A server in a process of its own takes tasks on loopback and keeps them open for a minute; the bench
polls them. Its memory and processor time are read from /proc while all are open. Prints JSON, also
written to bench-results/open-tasks.json.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aiohttp import web

TARGETS = {"memory_mb": 200, "cores": 0.5}
_TASK_S = 60.0
_RAMP_PER_MINUTE = 6000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--watch", type=float, default=30.0, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("bench-results/open-tasks.json"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve())
        return
    report = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
              "python": platform.python_version(), "targets": TARGETS,
              **_measure(options.tasks, options.watch)}  # fmt: skip
    text = json.dumps(report, indent=2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    print(text)


def _measure(tasks: int, watch_s: float) -> dict[str, Any]:
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    port = int(server.stdout.readline())
    with tempfile.TemporaryDirectory() as folder:
        bench = subprocess.Popen(
            [
                *(sys.executable, "-m", "redux_server", "bench", "--images", str(tasks)),
                *("--target", f"slow=http://127.0.0.1:{port}", "--arrivals", "even"),
                *("--rate", str(_RAMP_PER_MINUTE), "--encoder", "none", "--out", folder),
            ],
            stderr=subprocess.DEVNULL,
        )
        try:
            while _open_tasks(port) < tasks:
                time.sleep(0.5)
            before_s, polls, began_at = _cpu_s(bench.pid), _polls(port), time.monotonic()
            time.sleep(watch_s)
            spent_s = time.monotonic() - began_at
            assert _open_tasks(port) == tasks, "some have ended meanwhile: watch for less long"
            return {
                "open_tasks": tasks,
                "memory_mb": round(_peak_mb(bench.pid), 1),
                "cores_used": round((_cpu_s(bench.pid) - before_s) / spent_s, 3),
                "polls_per_second": round((_polls(port) - polls) / spent_s, 1),
            }
        finally:
            bench.terminate()
            bench.wait()
            server.terminate()
            server.wait()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _told(port: int) -> dict[str, Any]:
    from urllib.request import ProxyHandler, build_opener

    opener = build_opener(ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/counts", timeout=30) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


def _open_tasks(port: int) -> int:
    return int(_told(port)["open"])


def _polls(port: int) -> int:
    return int(_told(port)["polls"])


# --- the server ---------------------------------------------------------------------------------


async def _serve() -> None:
    begun: dict[str, float] = {}
    polls = 0

    async def submit(request: web.Request) -> web.Response:
        await request.read()
        task = f"t{len(begun)}"
        begun[task] = time.monotonic()
        return web.json_response(_task(task, "created"))

    async def poll(request: web.Request) -> web.Response:
        nonlocal polls
        polls += 1
        task = request.match_info["id"]
        is_done = time.monotonic() - begun[task] > _TASK_S
        return web.json_response(_task(task, "failed" if is_done else "processing"))

    async def counts(_: web.Request) -> web.Response:
        now = time.monotonic()
        still = sum(now - each <= _TASK_S for each in begun.values())
        return web.json_response({"open": still, "polls": polls})

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/api/v3/wavespeed-ai/flux-pro-redux", submit)
    app.router.add_get("/api/v3/predictions/{id}/result", poll)
    app.router.add_get("/counts", counts)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def _task(task: str, status: str) -> dict[str, Any]:
    return {"code": 200, "message": "success", "data": {"id": task, "status": status, "urls": {}}}


if __name__ == "__main__":
    main()
