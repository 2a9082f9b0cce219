"""The scenario ``local``: one API process with its worker over SQLite, restarted when it dies."""

import os
import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Row

from chaos import harm
from chaos.clock import Clock
from chaos.faults import Fault
from e2e.live import is_running, terminate
from e2e.restarted import RestartedServer, rows_of

LEASE_S = 6.0
FLOOR_MIB = 24
DISK_MIB = 2048
TMP_MIB = 16


class Embedded:
    """A server on one machine; with ``disk``, on a small file system that can be filled up."""

    name = "local"

    def __init__(
        self, folder: Path, *, env: Mapping[str, str], disk: Path | None, tmp: Path | None = None
    ) -> None:
        self.clock = Clock(folder / "clock")
        self.hang_flag = folder / "hang"
        self.tmp = tmp
        flags = [
            "--max-attempts",
            "50",
            "--lease-s",
            str(LEASE_S),
            "--webhook-allow",
            "127.0.0.1:*",
        ]
        flags += ["--webhook-timeout-s", "5", "--step-timeout-s", str(harm.STEP_TIMEOUT_S)]
        flags += ["--min-free-disk", str(FLOOR_MIB if disk else 0)]
        self.disk = disk
        data = (disk or folder) / "data"
        ours = {**self.clock.variables(), "CHAOS_HANG_FILE": str(self.hang_flag), **env}
        if tmp:
            ours["TMPDIR"] = str(tmp)
        self.server = RestartedServer(data, *flags, ready_s=600.0, env=ours)
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
        some += [
            Fault("kill -9 decoder", self.kill_decoder, kills=True, weight=4),
            Fault("device hangs", lambda: harm.hang_the_device(self.hang_flag), weight=1.5),
            Fault("temporary files wiped", self.wipe_temporary, weight=1.5),
        ]
        if disk := self.disk:
            some += [Fault("disk full for 6 s", lambda: harm.fill(disk), lasts=True)]
        if tmp := self.tmp:
            some += [
                Fault("/tmp full for 6 s", lambda: harm.fill(tmp), lasts=True),
                Fault("/tmp read-only for 6 s", lambda: harm.make_read_only(tmp), lasts=True),
            ]
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

    def kill_decoder(self) -> bool:
        return harm.kill_a_decoder(
            lambda: self.server.worker_pids() or [p for p in self.server.orphans if is_running(p)]
        )

    def wipe_temporary(self) -> bool:
        return harm.wipe(self.server.data_dir / "tmp") | bool(self.tmp and harm.wipe(self.tmp))


def _kill(pids: list[int]) -> None:
    for pid in pids[:1]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
