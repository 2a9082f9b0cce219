"""The scenario ``local``: one API process with its worker over SQLite, restarted when it dies."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Row

from chaos.clock import Clock
from chaos.faults import Fault
from e2e.live import is_running, terminate
from e2e.restarted import RestartedServer, rows_of

LEASE_S = 6.0
FLOOR_MIB = 24
DISK_MIB = 512


class Embedded:
    """A server on one machine; with ``disk``, on a small file system that can be filled up."""

    name = "local"

    def __init__(self, folder: Path, *, env: Mapping[str, str], disk: Path | None) -> None:
        self.clock = Clock(folder / "clock")
        flags = [
            "--max-attempts",
            "50",
            "--lease-s",
            str(LEASE_S),
            "--webhook-allow",
            "127.0.0.1:*",
        ]
        flags += ["--webhook-timeout-s", "5"]
        flags += ["--min-free-disk", str(FLOOR_MIB if disk else 0)]
        self.disk = disk
        data = (disk or folder) / "data"
        self.server = RestartedServer(
            data, *flags, ready_s=600.0, env={**self.clock.variables(), **env}
        )
        self.server.log_path = folder / "server.log"
        self._rows: Any = None
        self._open: Any = None

    @property
    def urls(self) -> list[str]:
        return [self.server.base_url]

    @property
    def key(self) -> str:
        return self.server.key

    @property
    def log(self) -> str:
        return self.server.log[-6000:]

    def start(self) -> None:
        self.server.start()
        self._open = rows_of(self.server.database_url)
        self._rows = self._open.__enter__()

    def stop(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self.server.stop()

    def rows(self) -> dict[str, Row[Any]]:
        found: dict[str, Row[Any]] = self._rows()
        return found

    def pids(self) -> list[int]:
        """The processes whose memory is watched."""
        return [self.server.pid, *self.server.worker_pids()]

    def faults(self) -> list[Fault]:
        some = [
            Fault("kill -9 API", self.kill_api, kills=True, weight=4),
            Fault("kill -9 worker", self.kill_worker, kills=True, weight=4),
            Fault("kill -9 orphaned worker", self.kill_orphan, kills=True, weight=2),
            Fault("SIGTERM server, and start", self.restart, weight=0.5),
            Fault("SIGSTOP worker for 2 leases", self.freeze_worker, lasts=True, weight=0.5),
        ]
        some += [
            Fault("clock +1 h, then back", lambda: self.shift_clock(3600), lasts=True),
            Fault("clock -1 h, then back", lambda: self.shift_clock(-3600), lasts=True),
        ]
        if self.disk:
            some += [Fault("disk full for 6 s", self.fill_disk, lasts=True)]
        return some

    def supervise(self) -> int:
        """Start the server again if it has ended by itself; returns how many did."""
        if self.server.process.poll() is None:
            return 0
        self.server.start(wait=False)
        return 1

    def save_logs(self, folder: Path) -> None:
        shutil.copy(self.server.log_path, folder)

    # --- faults --------------------------------------------------------------------------------

    def kill_api(self) -> None:
        self.server.crash()
        self.server.start(wait=False)

    def kill_worker(self) -> None:
        _kill(self.server.worker_pids() or [pid for pid in self.server.orphans if is_running(pid)])

    def kill_orphan(self) -> None:
        self.kill_api()
        _kill([pid for pid in self.server.orphans if is_running(pid)])

    def restart(self) -> None:
        """As for an update: it drains, ends and is started again."""
        terminate(self.server.process, 90.0)
        self.server.start(wait=False)

    def freeze_worker(self) -> None:
        for pid in self.server.worker_pids()[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(2 * LEASE_S)
                os.kill(pid, signal.SIGCONT)

    def shift_clock(self, seconds: int) -> None:
        self.clock.shift(seconds)
        time.sleep(6.0)
        self.clock.shift(0)
        time.sleep(1.5)

    def fill_disk(self) -> None:
        assert self.disk is not None
        filler = self.disk / "other-peoples-file"
        try:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 2**16)
            time.sleep(6.0)
        finally:
            filler.unlink(missing_ok=True)


def _kill(pids: list[int]) -> None:
    for pid in pids[:1]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def small_disk(place: Path, mib: int = DISK_MIB) -> Iterator[Path | None]:
    """A file system of its own, if we may mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(place)]
    made = subprocess.run(mount, capture_output=True, check=False)
    try:
        yield place if made.returncode == 0 else None
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
