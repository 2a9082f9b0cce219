"""A web server as pictures lie on: a few by name, no key asked for."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

from e2e.live import a_picture
from threaded import answering

_static = files("redux_server").joinpath("static")
PICTURES = {
    "/photo.jpg": _static.joinpath("sample.jpg").read_bytes(),
    "/icon.png": _static.joinpath("sample-icon.png").read_bytes(),
    "/teal.png": a_picture(),
}


class _Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        data = PICTURES.get(self.path)
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


def picture_site() -> AbstractContextManager[str]:
    """Serve ``PICTURES`` on loopback; its value is the base URL."""
    return serving(_Site)


@contextmanager
def serving(site: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Have ``site`` answer on loopback; yields the base URL."""
    with answering(ThreadingHTTPServer(("127.0.0.1", 0), site)) as server:
        yield f"http://127.0.0.1:{server.server_port}"
