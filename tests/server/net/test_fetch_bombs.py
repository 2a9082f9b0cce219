"""What hostile web servers cost in memory and time, measured in a process that only fetches.

The servers are this test's own, on loopback; the fetching process is allowed to reach 127.0.0.1 as
an operator's ``--fetch-allow 127.0.0.1`` would allow it.
"""

import gzip
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from redux_server.net.fetch import ImageFetcher
from redux_server.net.guard import AddressPolicy, FetchError

FETCHES = 32
MAX_RISE_BYTES = 64 * 2**20
DEADLINE_S = 10.0
SLACK_S = 5.0  # for a machine that is busy with something else

CODE = """
import json, sys, tempfile, threading, time
from redux_server.net.fetch import ImageFetcher
from redux_server.net.guard import AddressPolicy, FetchError
from redux_server.settings import ServerSettings

allowed = ServerSettings(fetch_allow="127.0.0.1:*").fetch_allow_entries
fetcher = ImageFetcher(AddressPolicy.from_entries(allowed), open_file=tempfile.TemporaryFile)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def fetch(url, results):
    started = time.monotonic()
    try:
        fetcher.fetch(url)
        reason = "fetched"
    except FetchError as error:
        reason = error.reason
    results.append((reason, time.monotonic() - started))

before = None
for line in sys.stdin:
    url, count = line.split()
    if before is None:
        fetch(url, [])  # what is imported and allocated once is no rise
        before = resident()
    peak, results = before, []
    threads = [threading.Thread(target=fetch, args=(url, results)) for _ in range(int(count))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        peak = max(peak, resident())
        time.sleep(0.005)
    print(json.dumps({"rise": peak - before, "results": results}), flush=True)
"""

Talk = Callable[[socket.socket], None]


def send_for_ever(client: socket.socket, head: bytes, piece: bytes, pause_s: float = 0.0) -> None:
    client.sendall(head)
    while True:
        client.sendall(piece)
        if pause_s:
            time.sleep(pause_s)


def endless(head: bytes, piece: bytes, pause_s: float = 0.0) -> Talk:
    return lambda client: send_for_ever(client, head, piece, pause_s)


def once(reply: bytes) -> Talk:
    return lambda client: client.sendall(reply)


def compressed(coding: str) -> bytes:
    """20 MB on the wire, if it were read, of what unpacks to 20 GB."""
    zeros = bytes(2**20)
    packed = gzip.compress(zeros) if coding == "gzip" else zlib.compress(zeros)
    body = packed * (20_000_000 // len(packed))
    head = f"Content-Type: image/png\r\nContent-Encoding: {coding}\r\nContent-Length: {len(body)}"
    return OK + head.encode() + b"\r\n\r\n" + body


OK = b"HTTP/1.1 200 OK\r\n"
BLOCK = bytes(2**18)
CHUNK = b"40000\r\n" + BLOCK + b"\r\n"
# What serves, and why it is refused.
FAST: dict[str, tuple[Talk, set[str]]] = {
    "endless body": (endless(OK + b"\r\n", BLOCK), {"too_large"}),
    "endless chunks": (endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", CHUNK), {"too_large"}),
    "more than declared, for ever": (
        endless(OK + b"Content-Length: 20971521\r\n\r\n", BLOCK),
        {"too_large"},
    ),
    "a petabyte declared": (
        endless(OK + b"Content-Length: 999999999999999\r\n\r\n", BLOCK),
        {"too_large"},
    ),
    "less than declared": (once(OK + b"Content-Length: 20000000\r\n\r\n" + BLOCK), {"connect"}),
    "endless header": (endless(OK + b"X: ", b"v" * 2**16), {"connect", "too_large"}),
    "endless headers": (endless(OK, b"X: v\r\n" * 9999), {"connect", "too_large"}),
    "endless 100 Continue": (
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 999),
        {"too_large", "timeout"},
    ),
    "gzip": (once(compressed("gzip")), {"encoding"}),
    "deflate": (once(compressed("deflate")), {"encoding"}),
    "endless chunk extension": (
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x" * 2**16),
        {"connect", "too_large"},
    ),
    "tiny chunks": (
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nv\r\n" * 9999),
        {"too_large", "timeout"},
    ),
}
SLOW: dict[str, tuple[Talk, set[str]]] = {
    "silence": (lambda client: time.sleep(60), {"timeout"}),
    "a head byte by byte": (endless(OK + b"X: ", b"v", 0.2), {"timeout"}),
    "a body byte by byte": (endless(OK + b"Content-Length: 9999\r\n\r\n", b"v", 0.2), {"timeout"}),
    "19 MB, then silence": (
        lambda client: (client.sendall(OK + b"\r\n" + bytes(19_000_000)), time.sleep(60))[1],
        {"timeout"},
    ),
}


@contextmanager
def hostile(talk: Talk) -> Iterator[str]:
    """A web server on loopback that answers every request with ``talk``; yields its URL."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * FETCHES) as listener:

        def serve(client: socket.socket) -> None:
            with client, suppress(OSError):
                client.settimeout(60)
                client.recv(65536)
                talk(client)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=serve, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/bomb.png"
        listener.shutdown(socket.SHUT_RDWR)


class Fetching:
    """A process that only fetches; what it holds is counted from its start, over all attacks."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={"PYTHONPATH": ":".join(sys.path), "MALLOC_ARENA_MAX": "2"},
        )  # fmt: skip

    def attack(self, talk: Talk, reasons: set[str]) -> float:
        """Fetch from ``talk`` with all threads; the seconds that the slowest took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with hostile(talk) as url:
            self.process.stdin.write(f"{url} {FETCHES}\n")
            self.process.stdin.flush()
            seen = json.loads(self.process.stdout.readline())
        slowest = max(seconds for _, seconds in seen["results"])
        print(f"rise {seen['rise'] / 2**20:.1f} MiB, slowest {slowest:.1f} s")
        assert len(seen["results"]) == FETCHES
        assert {reason for reason, _ in seen["results"]} <= reasons
        assert seen["rise"] < MAX_RISE_BYTES
        assert slowest < DEADLINE_S + SLACK_S
        return float(slowest)


@pytest.fixture(scope="module")
def fetching() -> Iterator[Fetching]:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    one = Fetching()
    yield one
    with one.process:
        one.process.kill()


LONG = {"endless 100 Continue", "tiny chunks"}  # parsed all the way to the deadline
MARKED = [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in FAST]


@pytest.mark.parametrize("name", MARKED)
def test_bombs_in_parallel_do_not_fill_the_memory(fetching: Fetching, name: str) -> None:
    fetching.attack(*FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slow_servers_are_left_at_the_deadline(fetching: Fetching, name: str) -> None:
    assert fetching.attack(*SLOW[name]) > DEADLINE_S - 0.5


def test_deadline_of_a_worker_is_ten_seconds() -> None:
    """What the slow tests take in real time, with a clock that jumps."""
    clock = itertools.count(0.0, 1.0).__next__
    with hostile(endless(OK + b"\r\n", b"v", 0.01)) as url, pytest.raises(FetchError) as caught:
        ImageFetcher(AddressPolicy.from_entries(["127.0.0.1:*"]), clock=clock).fetch(url)
    assert caught.value.reason == "timeout" and "longer than 10 s" in str(caught.value)
    assert 10 < clock() < 20
