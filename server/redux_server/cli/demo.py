"""``flux-redux demo``: a server of its own, one task through its HTTP API, images in a folder.

The server is a child process with a temporary data directory, so nothing of the user's is touched,
and it is stopped whatever happens here.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.resources import as_file
from pathlib import Path
from typing import Any, NoReturn

import httpx

from redux_server.api.auth import KeyRing
from redux_server.cli.client import Client, ClientError, make_folder
from redux_server.cli.progress import ProgressReport, note
from redux_server.cli.sample import sample
from redux_server.cli.submit import note_caveat, picture, read_parameters, report, wait_shown
from redux_server.database.migration import open_database
from redux_server.parameters import PredictionRequest
from redux_server.private_files import private_file
from redux_server.settings import ServerSettings, to_environment

_POLL_S = 0.5
_DRAIN_S = 5.0
_STOP_S = 20.0
_TAIL_LINES = 25


def demo(settings: ServerSettings, *, image: str, out: str, **parameters: Any) -> int:
    """Start a server, send it a picture, save what comes back, stop the server.

    Raises:
        UsageError: a parameter that cannot be used; nothing was started.
    """
    request = read_parameters(parameters)
    folder = Path(out)
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        with as_file(sample(settings)) as bundled:
            source = image or str(bundled)
            request = request.model_copy(update={"image": picture(source)})
            make_folder(folder)
            shown = _copy_input(source, folder)
            with tempfile.TemporaryDirectory(
                prefix="flux-redux-demo-", ignore_cleanup_errors=True
            ) as scratch:
                _run(request, _private(settings, Path(scratch)), folder)
    except ClientError as error:
        note(str(error))
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    if shown is not None:
        note(f"the picture they vary: {shown}")
    return 0


def _run(request: PredictionRequest, settings: ServerSettings, folder: Path) -> None:
    """One task from an empty data directory to images in ``folder``."""
    database = open_database(settings.database)
    key = KeyRing(database).create("demo")
    database.dispose()
    url = f"http://{settings.host}:{settings.port}"
    with _server(settings) as server:
        note(f"starting a server on {url} with the model {settings.base or settings.model}")
        started = time.monotonic()
        try:
            model = _wait_until_ready(server, url)
            note(f"ready after {time.monotonic() - started:.1f} s: {model}")
            with closing(Client(url, key)) as client:
                _vary(client, request, folder)
        except ClientError as error:
            raise ClientError(f"{error}{_tail(settings.data_dir)}") from error
    note_caveat(model.split(",")[0])


def _vary(client: Client, request: PredictionRequest, folder: Path) -> None:
    started = time.monotonic()
    task = wait_shown(client, client.submit(request))
    paths = client.download(task, folder, stem="variation")
    took_s = time.monotonic() - started
    report(task, paths)
    note(f"{len(paths)} image(s) of {request.size} in {took_s:.1f} s, saved in {folder}")


def _private(settings: ServerSettings, scratch: Path) -> ServerSettings:
    """The user's choice of model, on a server that only we know of."""
    return replace(
        settings,
        host="127.0.0.1",
        port=_free_port(),
        public_url="",
        data_dir=scratch,
        database_url="",
        dispatch="local",
        api_keys_file="",
        drain_timeout_s=_DRAIN_S,
        log_format="text",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _server(settings: ServerSettings) -> Iterator["subprocess.Popen[bytes]"]:
    """A running server process; its output goes to ``server.log`` in the data directory.

    It stays in our process group, so that Ctrl-C and a closing terminal reach it too.
    """
    private_file(settings.data_dir / "server.log")
    with (settings.data_dir / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "redux_server", "serve"],
            env={**os.environ, **to_environment(settings)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def _wait_until_ready(server: "subprocess.Popen[bytes]", url: str) -> str:
    """Wait for a worker, saying what for; returns how it describes its model.

    Raises:
        ClientError: the server or its worker could not start.
    """
    with httpx.Client(trust_env=False) as http, closing(ProgressReport()) as progress:
        while True:
            if server.poll() is not None:
                raise ClientError(f"the server ended with code {server.returncode}")
            workers = _workers(http, url)
            for worker in workers:
                if worker["state"] == "ready":
                    return str(worker["detail"])
                if worker["state"] == "failed":
                    raise ClientError(f"the model cannot be loaded: {worker['detail']}")
            progress.show(_waiting_for(workers))
            time.sleep(_POLL_S)


def _workers(http: httpx.Client, url: str) -> list[dict[str, Any]]:
    try:
        workers: list[dict[str, Any]] = http.get(f"{url}/readyz").json()["workers"]
    except httpx.TransportError:  # not listening yet
        return []
    return workers


def _waiting_for(workers: list[dict[str, Any]]) -> str:
    if not workers:
        return "waiting for the server"
    return "waiting for " + ", ".join(
        " ".join(filter(None, (w["device"], w["state"], w["detail"]))) for w in workers
    )


def _tail(data_dir: Path) -> str:
    """The last lines of the server's log, to follow a sentence."""
    text = (data_dir / "server.log").read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()[-_TAIL_LINES:]
    return "\n\nThe server's log ends with:\n  " + "\n  ".join(lines) if lines else ""


def _copy_input(source: str, folder: Path) -> Path | None:
    """Put the picture next to its variations; None where it is a URL."""
    if re.match(r"https?://", source, re.IGNORECASE):
        return None
    path = folder / f"input{Path(source).suffix}"
    try:
        shutil.copyfile(source, path)
    except shutil.SameFileError:
        pass
    except OSError as error:
        raise ClientError(f"cannot write {path}: {error.strerror}") from None
    return path


def _terminated(*_: object) -> NoReturn:
    """Leave by way of the ``finally`` clauses, which stop the server."""
    raise SystemExit(128 + signal.SIGTERM)
