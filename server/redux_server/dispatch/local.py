"""Worker processes on this machine, one per device, kept alive."""

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import structlog
from sqlalchemy.exc import SQLAlchemyError

from redux_server.dispatch.device import is_free, lock_path, worker_id
from redux_server.dispatch.presence import (
    EXIT_CANNOT_LOAD,
    EXIT_DEVICE_FAILED,
    EXIT_NOT_YET,
    Presence,
    WorkerState,
)
from redux_server.metrics import WorkerReports
from redux_server.settings import ServerSettings, UsageError, to_environment
from redux_server.tasks.store import TaskStore

_MAX_PAUSE_S = 30.0
_MAX_REPORT_BYTES = 4 * 2**20
_LAST_REPORT_S = 1.0
_BEAT_S = 5.0
_SAID_WHY = (EXIT_CANNOT_LOAD, EXIT_DEVICE_FAILED, EXIT_NOT_YET)
_HEALTHY_S = 60.0  # a worker that lived this long is restarted at once
_WORKER = (sys.executable, "-m", "redux_server", "worker", "--supervised")
_log = structlog.get_logger("redux_server.dispatch.local")


class LocalWorkers:
    """Starts a worker per device, wakes them when work arrives, restarts those that die.

    A worker's tasks are taken back the moment its process is gone, not when its lease runs out.
    ``command`` starts a worker; its settings come by the environment. What it writes to its
    standard output are ``reports`` of its metrics.

    Another server may have a worker of the same device and data directory: a second one, or one
    that ends. Ours waits for it then, and what it said of itself is not changed from here.

    One that cannot load its model stays ``failed`` in the list of workers while it is tried again.
    """

    def __init__(
        self,
        settings: ServerSettings,
        store: TaskStore,
        presence: Presence,
        reports: WorkerReports,
        *,
        command: Sequence[str] = _WORKER,
    ) -> None:
        self._settings = settings
        self._store = store
        self._presence = presence
        self._reports = reports
        self._command = command
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._supervisors: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._cannot_load: dict[str, str] = {}  # why, by device
        self._are_hopeless: set[str] = set()  # devices for which another try will not help
        self._has_worked = False

    @property
    def failure(self) -> str:
        """Why no worker can load its model, where that is so since the start and for good."""
        is_over = len(self._are_hopeless) == len(self._supervisors) and not self._has_worked
        return "; ".join(dict.fromkeys(self._cannot_load.values())) if is_over else ""

    async def start(self) -> None:
        """Start one supervised worker per device."""
        self._supervisors = [
            asyncio.create_task(self._supervise(device))
            for device in worker_devices(self._settings.device, self._settings.parallel)
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
        self._stopping.set()
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
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                if device not in self._cannot_load:
                    # What a worker of before last said of itself must not count for this one.
                    await asyncio.to_thread(self._say_if_free, device, "starting")
                code = await self._run_one(device)
                released = await asyncio.to_thread(self._take_back, device, code)
                await asyncio.to_thread(self._note_end, device, code, released)
            except Exception as error:  # no memory for a process, a full disk: try again later
                _log.error("cannot keep the worker alive", device=device, exc_info=error)
            lived_s = time.monotonic() - started
            pause_s = 0.0 if lived_s > _HEALTHY_S else min(_MAX_PAUSE_S, max(0.5, pause_s * 2))
            await self._pause(device, pause_s)
        with contextlib.suppress(SQLAlchemyError):
            await asyncio.to_thread(self._leave, device)

    async def _pause(self, device: str, pause_s: float) -> None:
        """Wait before the next try; what the last worker said of itself stays said."""
        ends_at = time.monotonic() + pause_s
        while (left_s := ends_at - time.monotonic()) > 0 and not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), min(left_s, _BEAT_S))
            with contextlib.suppress(SQLAlchemyError):
                await asyncio.to_thread(self._presence.heartbeat, self._name(device))

    def _note_end(self, device: str, code: int, released: int) -> None:
        """Say that a worker ended; why it cannot load its model is said once, not at each try."""
        if code in (EXIT_CANNOT_LOAD, EXIT_NOT_YET) and not self._stopping.is_set():
            reason = self._presence.detail_of(self._name(device))
            if self._cannot_load.get(device) != reason:
                _log.error("the model cannot be loaded", device=device, reason=reason)
            self._cannot_load[device] = reason
            if code == EXIT_CANNOT_LOAD:
                self._are_hopeless.add(device)
            else:
                self._are_hopeless.discard(device)
            return
        self._has_worked = True
        self._cannot_load.pop(device, None)
        self._are_hopeless.discard(device)
        _log.log(
            logging.INFO if self._stopping.is_set() else logging.ERROR,
            "worker ended",
            device=device,
            exit_code=code,
            tasks_returned=released,
        )

    def _take_back(self, device: str, code: int) -> int:
        # A server that was killed leaves its worker to finish. Ours then only waited for the
        # device, under the same name, and what is leased under it is still being worked on.
        if not is_free(lock_path(self._settings, device)):
            return 0
        name = self._name(device)
        has_crashed = not self._stopping.is_set()
        if has_crashed and code not in _SAID_WHY:  # those have said more than we know
            self._say(device, f"ended with code {code}, is being restarted")
        return self._store.release(name, has_crashed=has_crashed)

    def _say_if_free(self, device: str, detail: str) -> None:
        if is_free(lock_path(self._settings, device)):
            self._say(device, detail)

    def _leave(self, device: str) -> None:
        if is_free(lock_path(self._settings, device)):
            self._presence.leave(self._name(device))

    def _say(self, device: str, detail: str) -> None:
        self._presence.announce(self._name(device), device, WorkerState.LOADING, detail)

    def _name(self, device: str) -> str:
        return worker_id(self._settings.data_dir, device)

    async def _run_one(self, device: str) -> int:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_REPORT_BYTES,
            env={
                **os.environ,
                **to_environment(replace(self._settings, device=device)),
            },
            # Ctrl-C in a terminal reaches the whole group; the worker must outlive it to finish.
            start_new_session=True,
        )
        self._processes[device] = process
        assert process.stdin is not None and process.stdout is not None
        reading = asyncio.create_task(self._read_reports(device, process.stdout))
        try:
            if self._stopping.is_set():
                process.stdin.close()
            code = await process.wait()
            await asyncio.wait([reading], timeout=_LAST_REPORT_S)  # it may be on its way
            return code
        finally:
            reading.cancel()
            self._reports.end(device)
            del self._processes[device]

    async def _read_reports(self, device: str, pipe: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await pipe.readline()
                if not line:
                    return
                self._reports.receive(device, line)
            except ValueError as error:  # no report, or one that is too long
                _log.warning("a worker's metrics cannot be read", device=device, reason=str(error))


def worker_devices(setting: str, parallel: int = 1) -> list[str]:
    """The ``--device`` of each worker to start, a list where ``parallel`` of them make one image.

    They are dealt out in their order; of ``auto`` those that are too few for one more worker stay
    idle. One GPU stands for itself and those that follow it.

    Raises:
        UsageError: too few devices.
    """
    found = devices(setting)
    if parallel == 1 or setting == "cpu":
        return found
    if setting != "auto" and len(found) == 1:
        first = int(found[0].partition(":")[2] or 0)
        found = [f"cuda:{first + rank}" for rank in range(parallel)]
    gpus = [name for name in found if name != "cpu"]
    if len(gpus) < parallel or (setting != "auto" and len(gpus) % parallel):
        raise UsageError(
            f"--parallel {parallel} needs {parallel} GPUs for each worker, and --device {setting} "
            f"is {len(gpus)}; name as many, or --device cpu to try it out"
        )
    ends = range(parallel, len(gpus) + 1, parallel)
    return [",".join(gpus[end - parallel : end]) for end in ends]


def devices(setting: str) -> list[str]:
    """The devices that a setting means.

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
