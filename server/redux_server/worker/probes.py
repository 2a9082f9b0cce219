"""What a worker without an API process of its own answers about itself, from a thread.

``/livez``: is the process alive, and do its threads run; ``/readyz``: will it take a task now;
``/metrics``: its own counters. Knows no task and no database.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

_PATIENCE_S = 5.0  # with a client that does not send its request


class WorkerProbes:
    """What there is to say of a worker; written by whoever knows, read by those who ask."""

    def __init__(self) -> None:
        self.state = "loading"
        self.detail = ""
        self.is_alive: Callable[[], bool] = lambda: True
        self.obstacle: Callable[[], str] = lambda: ""
        """Why a worker that is ready takes no task just now; empty if it does."""

    def livez(self) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        if self.is_alive():
            return 200, {"status": "ok"}
        return 503, {"status": "a thread of this worker has ended"}

    def readyz(self) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        body = {"status": "ready", "state": self.state, "detail": self.detail}
        reason = self.obstacle() if self.state == "ready" else f"the worker is {self.state}"
        if not reason and self.is_alive():
            return 200, body
        return 503, {**body, "status": "not ready", "reason": reason or "it is not alive"}


def serve(host: str, port: int, probes: WorkerProbes) -> ThreadingHTTPServer:
    """Answer on ``host:port`` from now on.

    Raises:
        OSError: it cannot listen there.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = _PATIENCE_S

        def do_GET(self) -> None:  # the name that the library looks for
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._send(200, generate_latest(REGISTRY), CONTENT_TYPE_LATEST)
            elif path in ("/livez", "/health"):
                self._say(*probes.livez())
            elif path == "/readyz":
                self._say(*probes.readyz())
            else:
                self._say(404, {"status": "here are /livez, /readyz and /metrics"})

        def _say(self, status: int, body: dict[str, Any]) -> None:
            self._send(status, json.dumps(body).encode(), "application/json")

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Probes come every few seconds, and say nothing new."""

    server = ThreadingHTTPServer((host, port), Handler)
    threading.Thread(target=server.serve_forever, name="probes", daemon=True).start()
    return server
