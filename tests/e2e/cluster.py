"""API nodes and workers as separate processes over one PostgreSQL, on loopback.

Each has a data directory of its own, as on a machine of its own; pictures are in one folder.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from e2e.live import LiveServer, terminate


class Node(LiveServer):
    """An API node without workers of its own."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *flags: str,
        database_url: str,
        env: Mapping[str, str] | None = None,
    ) -> None:
        if "--blob-url" not in flags:
            flags += ("--blob-url", f"file://{folder / 'pictures'}")
        environment = {"FLUX_REDUX_DATABASE_URL": database_url, **(env or {})}
        super().__init__(folder / name, *flags, env=environment)
        self._url = database_url

    @property
    def database_url(self) -> str:
        return self._url


class RemoteWorker:
    """``flux-redux worker`` in a process of its own, with the flags and variables of ``node``.

    ``start`` after ``kill`` is the same worker again, as a supervisor would start it.
    """

    process: "subprocess.Popen[bytes]"

    def __init__(
        self,
        folder: Path,
        name: str,
        node: Node,
        *,
        model: str,
        flags: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.data_dir = folder / name
        self.log_path = folder / f"{name}.log"
        self.flags = ["--model", model, "--data-dir", str(self.data_dir), "--device", "cpu"]
        self.flags += node.flags if flags is None else flags
        self.environment = {**node._environment(), **(env or {})}
        self.start()

    def start(self) -> None:
        """Start the process; returns at once."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "redux_server", "worker", *self.flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        self.process.kill()
        self.process.wait()

    def stop(self, *, timeout_s: float = 30.0) -> int:
        """SIGTERM, and its exit code."""
        return terminate(self.process, timeout_s)
