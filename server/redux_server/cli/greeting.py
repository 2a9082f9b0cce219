"""What ``serve`` says to a person: at once where it is, and once a worker is ready how to use it.

On standard output, beside the log. The first key is made when it can be used, so that a start that
fails leaves none behind that nobody has seen.
"""

import os
import shlex
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from textwrap import fill

from sqlalchemy.exc import SQLAlchemyError

from redux_pipelines.loading.load import caveat
from redux_server import __version__
from redux_server.api.services import Services
from redux_server.cli.sample import sample
from redux_server.dispatch.presence import WorkerState
from redux_server.settings import ServerSettings, default_data_dir

LOOK_EVERY_S = 0.25
_SAMPLE_EXPIRES = 2**33
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
_KEY_VARIABLE = "FLUX_REDUX_KEY"


class Greeting:
    """Tells whoever started the server; ``port`` is the one it listens on."""

    def __init__(self, settings: ServerSettings, services: Services, port: int) -> None:
        self._settings = settings
        self._services = services
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        host = _EVERYWHERE.get(settings.host, host)
        self.url = settings.public_url.rstrip("/") or f"http://{host}:{port}"

    def begin(self) -> None:
        """Say what starts, and where."""
        settings = self._settings
        model = settings.base or settings.model
        what = f"with the model {model}" if settings.dispatch == "local" else "without workers"
        print(f"FLUX Redux Server {__version__} starts on {self.url} {what}", flush=True)
        text = None if settings.base else caveat(settings.model)
        if text and settings.dispatch == "local":
            print("\n" + fill(text[0].upper() + text[1:] + ".", 88), flush=True)

    def follow(self, has_started: Callable[[], bool], has_ended: threading.Event) -> None:
        """Say how to use the server once it is ready, from a thread of its own."""

        def wait() -> None:
            while not has_ended.wait(LOOK_EVERY_S):
                if has_started() and self._is_ready():
                    print(self.text(), flush=True)
                    return

        threading.Thread(target=wait, name="greeting", daemon=True).start()

    def text(self) -> str:
        """What is said of a server that is ready; makes the first key if there is none."""
        made = self._services.keys.create("first") if self._services.keys.is_empty() else ""
        lines = {
            "page": page_address(self._settings, self.url, made),
            "docs": f"{self.url}/docs",
            "key": f"{made}  (made now, and shown this once)" if made else self._about_keys(),
            "try": self._curl(made or f"${_KEY_VARIABLE}"),
            "stop": "Ctrl-C",
        }
        if not self._has_worker():
            lines["worker"] = f"none is ready; on each machine with a GPU: {_program()} worker"
        told = "".join(f"\n  {name:<6} {line}" for name, line in lines.items() if line)
        return f"\nReady: {self.url}{told}\n"

    def _is_ready(self) -> bool:
        # Workers of other machines come and go: they are no part of this start.
        return self._settings.dispatch != "local" or self._has_worker()

    def _has_worker(self) -> bool:
        try:
            workers = self._services.presence.all()
        except SQLAlchemyError:
            return False
        return any(each.state is WorkerState.READY for each in workers)

    def _about_keys(self) -> str:
        settings = self._settings
        if settings.api_keys_file:
            return f"one of those in {settings.api_keys_file}; export {_KEY_VARIABLE}=..."
        where = ""
        if settings.data_dir != default_data_dir():
            where = f" --data-dir {shlex.quote(str(settings.data_dir))}"
        if settings.database_url:
            where = " (with the same --database-url)"
        make = f"{_program()} keys create --name me{where}"
        return f"export {_KEY_VARIABLE}=... with one of yours; a new one: {make}"

    def _curl(self, key: str) -> str:
        return (
            f"curl -s {self.url}/api/v3/wavespeed-ai/flux-pro-redux "
            f'-H "Authorization: Bearer {key}" -H "Content-Type: application/json" '
            f'-d \'{{"image": "{self._sample_url()}", "size": "512*512", '
            '"enable_sync_mode": true}\''
        )

    def _sample_url(self) -> str:
        """A picture of our own that a paste can name, stored for it."""
        picture = sample(self._settings)
        blob = f"sample/{picture.name}"
        try:
            self._services.blobs.put(blob, picture.read_bytes())
        except OSError:  # a store that is away: then a URL of the caller's own
            return "https://example.com/photo.jpg"
        return self.url + self._services.signer.path(blob, _SAMPLE_EXPIRES)


def page_address(settings: ServerSettings, url: str, key: str) -> str:
    """Where the page is, with ``key`` in the fragment, which no browser sends; "" without a page.

    The page takes the key out of its address at once. The key is there only where this machine
    alone can reach the page: who types in an address of a server elsewhere may have others look on.
    """
    if settings.playground != "on":
        return ""
    return f"{url}/#key={key}" if key and settings.is_loopback else f"{url}/"


def _program() -> str:
    """How this program was called, for a line that can be pasted."""
    called = Path(sys.argv[0])
    if called.name != "flux-redux":
        return f"{shlex.quote(os.path.relpath(sys.executable))} -m redux_server"
    found = shutil.which("flux-redux")
    is_known = found is not None and Path(found).resolve() == called.resolve()
    return "flux-redux" if is_known else shlex.quote(os.path.join(".", os.path.relpath(called)))
