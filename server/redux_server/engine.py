"""The embedded engine: worker processes on this machine, one per device, kept alive."""

import asyncio
import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import structlog

from redux_server.presence import worker_id
from redux_server.settings import ServerSettings, to_environment
from redux_server.store import TaskStore

_MAX_PAUSE_S = 30.0
_HEALTHY_S = 60.0  # a worker that lived this long is restarted at once
_log = structlog.get_logger("redux_server.engine")


class LocalEngine:
    """Starts a worker per device, wakes them when work arrives, restarts those that die.

    A worker's tasks are taken back the moment its process is gone, not when its lease runs out.
    """

    def __init__(self, settings: ServerSettings, store: TaskStore) -> None:
        self._settings = settings
        self._store = store
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._supervisors: list[asyncio.Task[None]] = []
        self._is_stopping = False

    async def start(self) -> None:
        """Start one supervised worker per device."""
        self._supervisors = [
            asyncio.create_task(self._supervise(device))
            for device in devices(self._settings.device)
        ]

    def wake(self) -> None:
        """Tell every worker that there is work."""
        for process in self._processes.values():
            pipe = process.stdin
            # A worker that is busy or loading reads later; one line is then as good as many.
            if pipe is not None and pipe.transport.get_write_buffer_size() == 0:
                with contextlib.suppress(ConnectionError, RuntimeError):
                    pipe.write(b"\n")

    async def stop(self) -> None:
        """Let workers finish what is on their device, within the drain time, then end them."""
        self._is_stopping = True
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
        if not self._supervisors:
            return
        patience_s = self._settings.drain_timeout_s
        _, late = await asyncio.wait(self._supervisors, timeout=patience_s)
        if late:
            _log.warning("workers did not finish in time; their tasks go back to the queue")
            for process in self._processes.values():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await asyncio.wait(late)

    async def _supervise(self, device: str) -> None:
        pause_s = 0.0
        while not self._is_stopping:
            await asyncio.sleep(pause_s)
            started = time.monotonic()
            code = await self._run_one(device)
            released = await asyncio.to_thread(self._store.release, worker_id(device))
            if self._is_stopping:
                return
            lived_s = time.monotonic() - started
            pause_s = 0.0 if lived_s > _HEALTHY_S else min(_MAX_PAUSE_S, max(0.5, pause_s * 2))
            _log.error(
                "worker ended, restarting",
                device=device,
                exit_code=code,
                tasks_returned=released,
                pause_s=pause_s,
            )

    async def _run_one(self, device: str) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "redux_server",
            "worker",
            "--supervised",
            stdin=asyncio.subprocess.PIPE,
            env={**os.environ, **to_environment(replace(self._settings, device=device))},
            # Ctrl-C in a terminal reaches the whole group; the worker must outlive it to finish.
            start_new_session=True,
        )
        self._processes[device] = process
        try:
            if self._is_stopping and process.stdin is not None:
                process.stdin.close()
            return await process.wait()
        finally:
            del self._processes[device]


def devices(setting: str) -> list[str]:
    """The devices to start a worker for.

    ``auto`` is every NVIDIA GPU that this process may see, else the CPU. Does not load torch.
    """
    if setting != "auto":
        return [part.strip() for part in setting.split(",") if part.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    else:
        driver = Path("/proc/driver/nvidia/gpus")
        count = len(list(driver.iterdir())) if driver.is_dir() else 0
    return [f"cuda:{i}" for i in range(count)] or ["cpu"]
