"""A small closed-loop HTTP/1.1 load generator on loopback: raw sockets, keep-alive, latencies.

General HTTP clients for Python cost more CPU per request than the server under test.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """What one run saw. Latencies in milliseconds, of answers with status 200 only."""

    requests: int
    errors: int
    seconds: float
    latencies_ms: list[float]
    bodies: list[bytes]

    def summary(self) -> dict[str, float]:
        """Rate and percentiles."""
        return {
            "per_second": round(len(self.latencies_ms) / self.seconds, 1),
            "p50_ms": percentile(self.latencies_ms, 50),
            "p99_ms": percentile(self.latencies_ms, 99),
            "requests": self.requests,
            "errors": self.errors,
        }


def percentile(values: list[float], percent: float) -> float:
    """The value below which ``percent`` of ``values`` lie (nearest rank)."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))], 2)


def request(method: str, path: str, key: str, body: bytes = b"") -> bytes:
    """The bytes of one request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


async def run_load(
    port: int, requests: Iterator[bytes], *, connections: int, keep_bodies: bool = False
) -> Load:
    """Send ``requests`` over ``connections`` sockets, each waiting for its answer first."""
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    bodies: list[bytes] = []
    failures: list[int] = []

    def record(status: int, seconds: float, body: bytes) -> None:
        if status == 200:
            latencies.append(seconds * 1000)
            if keep_bodies:
                bodies.append(body)
        else:
            failures.append(status)

    started = time.perf_counter()
    finished = []
    for _ in range(connections):
        done: asyncio.Future[None] = loop.create_future()
        await loop.create_connection(
            lambda done=done: _Connection(requests, record, done), "127.0.0.1", port
        )
        finished.append(done)
    await asyncio.gather(*finished)
    seconds = time.perf_counter() - started
    return Load(len(latencies) + len(failures), len(failures), seconds, latencies, bodies)


class _Connection(asyncio.Protocol):
    def __init__(
        self,
        requests: Iterator[bytes],
        record: Callable[[int, float, bytes], None],
        done: "asyncio.Future[None]",
    ) -> None:
        self._requests = requests
        self._record = record
        self._done = done
        self._buffer = b""
        self._sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send_next()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        self._record(int(head[9:12]), time.perf_counter() - self._sent_at, rest[:length])
        self._send_next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)

    def _send_next(self) -> None:
        message = next(self._requests, None)
        if message is None:
            self._transport.close()
            return
        self._sent_at = time.perf_counter()
        self._transport.write(message)
