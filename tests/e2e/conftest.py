"""One live server with the tiny random-weight FLUX, and a site that holds pictures."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

import pytest

from e2e.live import LiveServer, a_picture

PICTURES = {
    "/photo.jpg": files("redux_server").joinpath("static/sample.jpg").read_bytes(),
    "/teal.png": a_picture(),
}


class PictureSite(BaseHTTPRequestHandler):
    """A web server as pictures lie on: it holds ``PICTURES`` and asks for no key."""

    def do_GET(self) -> None:
        data = PICTURES.get(self.path)
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """The base URL of the picture site."""
    with ThreadingHTTPServer(("127.0.0.1", 0), PictureSite) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A live server with the real pipeline over random weights; it may fetch from this machine."""
    data_dir = tmp_path_factory.mktemp("tiny") / "data"
    with LiveServer(data_dir, "--fetch-allow", "127.0.0.1", model="tiny") as server:
        yield server
