"""A server that is killed and comes back over the same data, and a look at its rows meanwhile."""

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import httpx
from sqlalchemy import Row, make_url, select

from e2e.live import LiveServer, children, is_running, wait_until
from redux_server.database.connection import reader
from redux_server.database.migration import open_database
from redux_server.database.tables import tasks

Rows = Callable[[], dict[str, Row[Any]]]


class RestartedServer(LiveServer):
    """A server that is killed and comes back; its database can be looked at meanwhile."""

    def __init__(self, *args: Any, model: str = "fake-slow", **options: Any) -> None:
        super().__init__(*args, model=model, **options)
        self.orphans: list[int] = []

    def stop(self, *, timeout_s: float = 30.0) -> int:
        try:
            return super().stop(timeout_s=timeout_s)
        finally:
            for pid in self.orphans:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def crash(self) -> None:
        """SIGKILL to the API process; its workers live on without it."""
        self.orphans = [pid for pid in self.orphans if is_running(pid)]
        self.orphans += children(self.process.pid)
        self.kill()

    def wait_live(self) -> None:
        """Wait until the API answers, workers or none."""

        def is_live() -> bool:
            with suppress(httpx.TransportError):
                return httpx.get(f"{self.base_url}/livez", timeout=5).status_code == 200
            return False

        wait_until(is_live, 30, what=lambda: self.log)

    def worker(self) -> int:
        """The process id of the one worker, once there is one."""
        wait_until(lambda: bool(self.worker_pids()), 15, what=lambda: self.log)
        return self.worker_pids()[0]

    def freeze(self, pid: int) -> None:
        """SIGSTOP to a worker, at a moment when it holds no lock of the database.

        Stopped within a transaction it would keep every other process from writing.
        """
        for _ in range(50):
            os.kill(pid, signal.SIGSTOP)
            if can_be_written(make_url(self.database_url).database or ""):
                return
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)
        raise AssertionError(f"process {pid} always holds the database")

    @contextmanager
    def rows(self) -> Iterator[Rows]:
        """A function that reads all tasks' rows by id, without ever writing."""
        with rows_of(self.database_url) as read:
            yield read


def can_be_written(path: str) -> bool:
    """Whether no process holds the SQLite database at ``path`` for longer than half a second."""
    with closing(sqlite3.connect(path, timeout=0.5, isolation_level=None)) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        db.execute("ROLLBACK")
        return True


@contextmanager
def rows_of(database_url: str) -> Iterator[Rows]:
    """A function that reads all tasks' rows by id, without ever writing."""
    engine = open_database(database_url)
    try:

        def read() -> dict[str, Row[Any]]:
            with reader(engine).connect() as db:
                return {row.id: row for row in db.execute(select(tasks))}

        yield read
    finally:
        engine.dispose()
