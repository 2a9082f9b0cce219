"""HTTP for thousands of requests at once, over aiohttp: of the clients at hand the cheapest a poll.

Tells apart what matters to a benchmark: a request that never left, one whose answer is unknown, and
an answer. Knows no task.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

MAX_ANSWER_BYTES = 64 * 2**20
CONNECT_S = 10.0


class NotSent(Exception):
    """The request did not leave: no connection was made."""


class NoAnswer(Exception):
    """The request left, and no whole answer came: it may or may not have been carried out."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, or None if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class Transport(Protocol):
    """What carries requests to a target; tests put a target in memory behind it."""

    async def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> Answer:
        """Send a request. Raises ``NotSent`` or ``NoAnswer``."""
        ...

    def events(
        self, url: str, headers: Mapping[str, str], timeout_s: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The data of each server-sent event; ends when the stream does, for whatever reason."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class HttpTransport:
    """Connections to one target. As many as there are requests: a pool would hide a queue in us."""

    def __init__(self, *, is_local: bool) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=0, ttl_dns_cache=300),
            # a proxy meant for the internet does not know this machine's loopback
            trust_env=not is_local,
            auto_decompress=True,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> Answer:
        """Send a request; a redirect is followed only where no key is sent."""
        has_key = "Authorization" in headers
        try:
            async with self._session.request(
                method,
                url,
                headers=headers,
                data=body or None,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S),
                allow_redirects=not has_key,
                max_redirects=5,
            ) as response:
                return Answer(
                    response.status,
                    {name.lower(): value for name, value in response.headers.items()},
                    await _read(response),
                )
        except _NOT_SENT as error:
            raise NotSent(_reason(error)) from None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise NoAnswer(_reason(error)) from None

    async def events(
        self, url: str, headers: Mapping[str, str], timeout_s: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The data of each server-sent event that is a JSON object."""
        asked = {"Accept": "text/event-stream", **headers}
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S)
        try:
            async with self._session.get(
                url, headers=asked, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    return
                async with aclosing(_data_of(response)) as found:
                    async for data in found:
                        yield data
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return


_NOT_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.InvalidURL,
    ssl.SSLCertVerificationError,
)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body. Raises ``ValueError`` for one that is too large."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
    return bytes(body)


async def _data_of(response: aiohttp.ClientResponse) -> AsyncGenerator[dict[str, Any], None]:
    """Server-sent events as the WHATWG has them: lines of ``data:`` up to an empty line."""
    lines: list[bytes] = []
    async for raw in response.content:
        line = raw.rstrip(b"\r\n")
        if line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
        elif not line and lines:
            data, lines = json.loads(b"\n".join(lines)), []
            if isinstance(data, dict):
                yield data


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
