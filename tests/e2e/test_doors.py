"""What a stranger, or a caller with a key, must not get a live server to do.

Only loopback is ever written to: other private addresses are tried at the guard, with recording
sockets (tests/server/net/test_guard.py).
"""

import base64
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.live import MODEL_PATH, LiveServer, a_picture, data_uri, plain_client
from server.bad_urls import loopback_urls
from threaded import answering

SITE_ADDRESS = "127.0.0.9"  # the one address that the operator allowed
CANARY_ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.53", "127.1.2.3", "127.255.255.254", "::1")
SMALL = {"size": "512*512", "num_inference_steps": 1}
MEDIA_ACCESS_FAILED = 1402
RETRY_WORDS = ("timeout", "connection", "http 5", "http 429")


class Canary:
    """Listeners on one port of many loopback addresses, which only count who connects."""

    def __init__(self) -> None:
        self.visits: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.port = 0

    @contextmanager
    def singing(self) -> Iterator["Canary"]:
        with ExitStack() as stack:
            for address in CANARY_ADDRESSES:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                with suppress(OSError):  # a machine may lack IPv6
                    listener = socket.create_server((address, self.port), family=family)
                    self.port = listener.getsockname()[1]
                    stack.callback(listener.close)
                    stack.callback(listener.shutdown, socket.SHUT_RDWR)
                    self._listen(address, listener)
            assert self.addresses[0] == CANARY_ADDRESSES[0] and len(self.addresses) >= 5
            yield self

    def _listen(self, address: str, listener: socket.socket) -> None:
        def count() -> None:
            with suppress(OSError):
                while True:
                    visitor, _ = listener.accept()
                    self.visits[address] += 1
                    visitor.close()

        self.addresses.append(address)
        threading.Thread(target=count, daemon=True).start()


class Site(ThreadingHTTPServer):
    """Redirects ``/N`` to the N-th of ``targets``; ``/picture`` is one."""

    targets: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__((SITE_ADDRESS, 0), _Redirector)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://{SITE_ADDRESS}:{self.server_port}"


class _Redirector(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/picture"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(a_picture())))
            self.end_headers()
            self.wfile.write(a_picture())
            return
        self.send_response(302)
        self.send_header("Location", self.server.targets[int(self.path[1:])])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    with Canary().singing() as canary:
        yield canary


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with answering(Site()) as site:
        yield site


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    flags = ("--fetch-allow", f"{SITE_ADDRESS}:*", "--log-level", "debug")
    with LiveServer(tmp_path_factory.mktemp("doors") / "data", *flags) as server:
        yield server


def submit_all(server: LiveServer, urls: list[str]) -> dict[str, httpx.Response]:
    with server.client() as client:
        return {url: client.post(MODEL_PATH, json={**SMALL, "image": url}) for url in urls}


def check_all_failed(server: LiveServer, answers: dict[str, httpx.Response]) -> None:
    """Each was refused at once, or accepted and failed for a reason that gives nothing away."""
    for url, answer in answers.items():
        if answer.status_code == 200:
            task = server.wait(answer.json()["data"]["id"])
            assert (task["status"], task["code"]) == ("failed", MEDIA_ACCESS_FAILED), (url, task)
            assert "s3cret" not in task["error"], url
            assert not [word for word in RETRY_WORDS if word in task["error"].lower()], url
        else:
            assert answer.status_code == 400, (url, answer.text)


def test_canary_sees_who_does_connect(canary: Canary) -> None:
    seen = Counter(canary.visits)
    for address in canary.addresses:
        with socket.create_connection((address, canary.port), 5) as visitor:
            assert visitor.recv(1) == b""
    assert canary.visits - seen == Counter(canary.addresses)


def test_no_way_to_write_this_machine_reaches_it(guarded: LiveServer, canary: Canary) -> None:
    before = Counter(canary.visits)
    urls = [url for url in loopback_urls(canary.port)]
    urls += [url.replace("http://", "https://") for url in urls[:20]]
    assert len(urls) >= 70
    answers = submit_all(guarded, urls)
    check_all_failed(guarded, answers)
    assert sum(answer.status_code == 200 for answer in answers.values()) > 40, "none got that far"
    assert canary.visits == before


def test_no_redirect_from_an_allowed_host_reaches_it(
    guarded: LiveServer, canary: Canary, site: Site
) -> None:
    before = Counter(canary.visits)
    site.targets = tuple(url for url in loopback_urls(canary.port) if url.isascii())
    assert len(site.targets) >= 40
    check_all_failed(
        guarded, submit_all(guarded, [f"{site.url}/{i}" for i in range(len(site.targets))])
    )
    assert len(site.asked) >= len(site.targets), "the redirects were never asked for"
    assert canary.visits == before


def test_host_that_the_operator_allowed_is_fetched_from(guarded: LiveServer, site: Site) -> None:
    task = guarded.run({**SMALL, "image": f"{site.url}/picture"})
    assert task["status"] == "completed", task


def test_no_secret_is_in_any_log(guarded: LiveServer, canary: Canary, site: Site) -> None:
    """Everything that callers hold secret goes through the server at its most talkative."""
    secret = "hush-2d1f"
    host = f"127.0.0.1:{canary.port}"
    picture = a_picture(70, 50, "plum")
    for image in (
        f"{site.url}/picture?token={secret}",
        f"http://{host}/a.png?token={secret}",
        f"http://me:{secret}@{host}/a.png",
        f"http://10.0.0.1/{secret}.png?{secret}",
        f"http://no-such-host.invalid/{secret}.png?{secret}",
        data_uri(picture),
    ):
        guarded.run({**SMALL, "image": image, "prompt": f"a {secret} wish"})
    strange: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", MODEL_PATH, {"content": f'{{"image": "{secret}"'}),
        ("POST", MODEL_PATH, {"json": {"image": f"ftp://{secret}/"}}),
        ("POST", MODEL_PATH, {"json": {"image": "x", "prompt": [secret], "size": secret}}),
        ("POST", f"{MODEL_PATH}?webhook=https://example.com/{secret}", {"json": {"image": secret}}),
        ("POST", f"/api/v3/wavespeed-ai/other?key={secret}", {"json": {}}),
        ("GET", f"/nope?key={secret}", {}),
        ("GET", "/livez", {"headers": {"Cookie": secret, "X-API-Key": secret}}),
        ("GET", "/api/v3/x", {"headers": {"Authorization": f"Bearer frs_{secret}"}}),
        ("GET", "/api/v3/x", {"headers": {"Authorization": f"Basic {secret}"}}),
        ("GET", "/livez", {"headers": {"X-Request-ID": f"<{secret}>"}}),
    ]
    with guarded.client() as client:
        for method, path, more in strange:
            assert client.request(method, path, **more).status_code < 500
    output = guarded.run({**SMALL, "image": data_uri(picture)})["outputs"][0]
    with plain_client() as client:
        assert client.get(output).status_code == 200
        assert client.get(output.replace("/0.png", "/1.png")).status_code == 404
    log = guarded.log_with("task ended")
    assert '"level": "debug"' in log, "it said nothing at all"
    signature = httpx.URL(output).path.split("/")[2]
    for hidden in (secret, guarded.key, signature, base64.b64encode(picture).decode()[20:60]):
        assert hidden not in log, log[max(0, log.index(hidden) - 500) :][:1000]


def test_line_breaks_and_escapes_in_a_path_forge_no_log_line(guarded: LiveServer) -> None:
    with plain_client(base_url=guarded.base_url) as client:
        client.get("/a%0aforged%0d%1b%5b2Jline%e2%80%a8")
    line = next(line for line in guarded.log_with("forged").splitlines() if "forged" in line)
    assert line.startswith("{") and line.endswith("}") and "2Jline" in line
    assert line.isascii() and line.isprintable()


def test_client_that_leaves_within_its_body_leaves_no_traceback(guarded: LiveServer) -> None:
    head = (
        f"POST {MODEL_PATH} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {guarded.key}\r\n"
        "Content-Length: 100000\r\n\r\n{"
    )
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", guarded.port), 5) as client:
            client.sendall(head.encode())
    assert guarded.run({**SMALL, "image": data_uri(a_picture())})["status"] == "completed"
    assert "Traceback" not in guarded.log


def test_strangers_are_not_listened_for_without_a_key(tmp_path: Path) -> None:
    server = LiveServer(tmp_path / "data", "--host", "0.0.0.0")
    server.start(wait=False)
    assert server.process.wait(60) == 2
    assert "refusing to listen on 0.0.0.0 while nobody has an API key" in server.log
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), 5).close()
