"""A real server in a process of its own, for tests that speak to it over HTTP.

with LiveServer(tmp_path / "data") as server:
    task = server.run({"image": data_uri(a_picture()), "size": "512*512"})
"""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
MODEL_PATH = "/api/v3/wavespeed-ai/flux-pro-redux"
TERMINAL = ("completed", "failed", "cancelled")


class LiveServer:
    """``flux-redux serve`` on loopback, from ``start`` to ``stop``; also a context manager.

    ``flags`` go to the command line as they are. The port is chosen once, so that ``start`` after
    ``stop`` or ``kill`` is a restart at the same address over the same data. Output of all runs,
    workers' included, gathers in ``log``.
    """

    process: "subprocess.Popen[bytes]"

    def __init__(
        self,
        data_dir: Path,
        *flags: str,
        model: str = "fake",
        port: int = 0,
        env: Mapping[str, str] | None = None,
        ready_s: float = 90.0,
    ) -> None:
        self.data_dir = data_dir
        self.flags = flags
        self.model = model
        self.port = port or free_port()
        self.env = dict(env or {})
        self.ready_s = ready_s
        self.log_path = data_dir.with_name(f"{data_dir.name}-server.log")

    # --- life ---------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, *, wait: bool = True) -> None:
        """Start the process and, with ``wait``, wait until a worker is ready."""
        command = [sys.executable, "-m", "redux_server", "serve", *self._arguments(), *self.flags]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.log_path.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
            )
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.stop()
                raise

    def stop(self, *, timeout_s: float = 30.0) -> int:
        """SIGTERM, then SIGKILL to whatever is left, by process id; returns the exit code."""
        workers = self.worker_pids()
        try:
            return terminate(self.process, timeout_s)
        finally:
            for pid in workers:
                wait_until(lambda pid=pid: not is_running(pid), 10.0, must=False)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL to the API process only; its workers notice by themselves."""
        self.process.kill()
        self.process.wait()

    def wait_ready(self) -> None:
        """Wait for ``/readyz`` to answer 200."""

        def is_ready() -> bool:
            assert self.process.poll() is None, f"the server ended early:\n{self.log}"
            with suppress(httpx.TransportError), plain_client(timeout=5) as client:
                return client.get(f"{self.base_url}/readyz").status_code == 200
            return False

        wait_until(is_ready, self.ready_s, what=lambda: f"not ready; its log:\n{self.log}")

    # --- what a test needs of it ----------------------------------------------------------------

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_with(self, text: str, *, timeout_s: float = 10.0) -> str:
        """The log once ``text`` is in it: a line may come a moment after the answer it is of."""
        wait_until(lambda: text in self.log, timeout_s, what=lambda: f"no {text!r} in\n{self.log}")
        return self.log

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.data_dir / 'tasks.db'}"

    @cached_property
    def key(self) -> str:
        """An API key of this server's database, made at first use."""
        return self.create_key("live")

    def create_key(self, name: str) -> str:
        """One more API key."""
        from redux_server.api.auth import KeyRing
        from redux_server.database.migration import open_database

        engine = open_database(self.database_url)
        try:
            return KeyRing(engine).create(name)
        finally:
            engine.dispose()

    def worker_pids(self) -> list[int]:
        """The server's worker processes."""
        return children(self.process.pid)

    def client(self, key: str | None = None) -> httpx.Client:
        """An HTTP client that sends ``key`` (default: this server's)."""
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
        return plain_client(base_url=self.base_url, headers=headers)

    def submit(self, body: Mapping[str, Any], *, path: str = MODEL_PATH) -> dict[str, Any]:
        """Submit and return the prediction; the answer must be 200."""
        with self.client() as client:
            return prediction(client.post(path, json=dict(body)))

    def get(self, task_id: str) -> dict[str, Any]:
        """The prediction as it is now."""
        with self.client() as client:
            return prediction(client.get(f"/api/v3/predictions/{task_id}/result"))

    def wait(self, task_id: str, *, timeout_s: float = 60.0) -> dict[str, Any]:
        """The prediction once it has ended."""
        ended: dict[str, Any] = {}

        def has_ended() -> bool:
            ended.update(self.get(task_id))
            return ended["status"] in TERMINAL

        wait_until(has_ended, timeout_s, what=lambda: f"still {ended}; log:\n{self.log[-4000:]}")
        return ended

    def run(self, body: Mapping[str, Any], *, timeout_s: float = 60.0) -> dict[str, Any]:
        """Submit and wait."""
        return self.wait(self.submit(body)["id"], timeout_s=timeout_s)

    # --- how it is started ----------------------------------------------------------------------

    def _arguments(self) -> list[str]:
        given = {"--model": self.model, "--data-dir": str(self.data_dir), "--port": str(self.port)}
        # As flags override each other only by position, leave out what the test sets itself.
        return [part for flag, value in given.items() if flag not in self.flags
                for part in (flag, value)]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("FLUX_REDUX_", "PROMETHEUS_", "COV_"))
        }
        paths = [str(ROOT / name) for name in ("server", "pipelines", "kernels", "weights")]
        ours = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "NO_PROXY": "*"}
        return {**inherited, **ours, **self.env}


def plain_client(**options: Any) -> httpx.Client:
    """An HTTP client for loopback: it loads no certificates, which would take 50 ms each time."""
    return httpx.Client(**{"timeout": 30, "verify": False, "trust_env": False, **options})


def prediction(response: httpx.Response) -> dict[str, Any]:
    """``data`` of a good answer."""
    assert response.status_code == 200, (response.status_code, response.text)
    body = response.json()
    assert (body["code"], body["message"]) == (200, "success"), body
    data: dict[str, Any] = body["data"]
    return data


def download(url: str) -> Image.Image:
    """The picture at an output URL, fetched as clients do: without a key."""
    with plain_client() as client:
        answer = client.get(url)
    assert answer.status_code == 200, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "image/png"
    image = Image.open(io.BytesIO(answer.content))
    image.load()
    return image


def a_picture(width: int = 64, height: int = 48, colour: str = "teal") -> bytes:
    """A small PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """``data`` as clients send it inline."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def wait_until(
    condition: Callable[[], bool],
    timeout_s: float,
    *,
    what: Callable[[], str] = lambda: "condition not met",
    must: bool = True,
    every_s: float = 0.05,
) -> bool:
    """Poll ``condition``; with ``must``, not in time is an assertion error."""
    ends_at = time.monotonic() + timeout_s
    while not (is_met := condition()) and time.monotonic() < ends_at:
        time.sleep(every_s)
    assert is_met or not must, f"after {timeout_s:g} s: {what()}"
    return is_met


def terminate(process: "subprocess.Popen[bytes]", timeout_s: float) -> int:
    """SIGTERM, then SIGKILL if that is not enough in time; returns the exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stat(pid: int | str) -> list[str]:
    """The fields of ``/proc/<pid>/stat`` after the command's name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def children(pid: int) -> list[int]:
    """The ids of the processes that ``pid`` started and that are not zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                state, parent = _stat(entry.name)[:2]
                if int(parent) == pid and state != "Z":
                    found.append(int(entry.name))
    return sorted(found)


def is_running(pid: int) -> bool:
    """Whether ``pid`` is a process that has not ended (a zombie has)."""
    with suppress(OSError, IndexError):
        return _stat(pid)[0] != "Z"
    return False
