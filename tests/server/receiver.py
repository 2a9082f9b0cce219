"""Receivers of webhooks on loopback, for tests; and how one checks a signature.

The check follows the hosted service's documentation and shares no code with what it checks.
"""

import hashlib
import hmac
import socket
import socketserver
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

from threaded import answering


@dataclass(frozen=True)
class Received:
    """One call; header names are in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


@contextmanager
def _serving(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    with answering(_Server(("127.0.0.1", 0), handler)) as server:
        yield server.server_address[1]


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Run ``serve`` for each connection; yields the port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                serve(self.request)

    with _serving(Handler) as port:
        yield port


@contextmanager
def receiving(answer: Callable[[Received], int]) -> Iterator[int]:
    """Answer each POST with the status that ``answer`` gives; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            body = self.rfile.read(length)
            if len(body) < length:  # its sender was killed in the middle: this is no request
                self.close_connection = True
                return
            headers = {name.lower(): value for name, value in self.headers.items()}
            status = answer(Received(self.path, headers, body))
            with suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

        def handle(self) -> None:
            with suppress(OSError):
                super().handle()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with _serving(Handler) as port:
        yield port


def is_signed(call: Received, secret: str) -> bool:
    """Whether a call carries the v3 signature of ``secret``."""
    version, _, signature = call.headers["webhook-signature"].partition(",")
    key = secret[len("whsec_") :].encode("ascii")
    signed = b"%b.%b.%b" % (
        call.headers["webhook-id"].encode(),
        call.headers["webhook-timestamp"].encode(),
        call.body,
    )
    return version == "v3" and signature == hmac.new(key, signed, hashlib.sha256).digest().hex()
