"""Fetch a caller's picture over http(s), without a way into the operator's network.

Holds ``ImageFetcher``: redirects, limits and what an answer must look like. Synchronous; knows
nothing of pictures, tasks or the HTTP API. The rules on hosts and addresses are in
``redux_server.net.guard``, the exchange under them in ``redux_server.net.client``.
"""

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import IO
from urllib.parse import urljoin

import httpcore

from redux_server import __version__
from redux_server.net.client import (
    Clock,
    Connector,
    Deadline,
    GuardedClient,
    Resolver,
    connect,
    resolve,
)
from redux_server.net.content_coding import codings
from redux_server.net.guard import AddressPolicy, FetchError, Reason, Target, parse_url, quoted

SPOOL_BYTES = 512 * 1024
# Some hosts answer nobody without such a header, or whose header names no browser's kind.
USER_AGENT = (
    f"flux-redux-server/{__version__} (compatible; Mozilla/5.0; fetches one picture for its user)"
)

_HEADERS = {
    "User-Agent": USER_AGENT,
    "Accept": "image/*, */*;q=0.5",
    "Accept-Encoding": "identity",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({429, 502, 503, 504})
_PAUSE_S = 0.5  # before the second try, unless the host names a time
_LONGEST_PAUSE_S = 5.0
_ANOTHER_WAY = "send the picture as a data URI or upload it"
_USUAL_ADVICE = f"Check the URL, or {_ANOTHER_WAY}."
_ADVICE: dict[Reason, str] = {
    "address": (
        f"Instead, {_ANOTHER_WAY}, or let the operator allow this host and port with --fetch-allow."
    ),
    "encoding": f"Instead, {_ANOTHER_WAY}.",
    "port": "Let the operator allow this port with --fetch-allow.",
    "redirect": f"Give the final URL of the picture, or {_ANOTHER_WAY}.",
    "too_large": "Send a smaller picture.",
    "tls": f"Instead, {_ANOTHER_WAY}.",
}


class _Advised(FetchError):
    """An error whose text says what to do already."""


class _Busy(_Advised):
    """The host asks to come again; after how many seconds, if it says so."""

    def __init__(self, public_message: str, retry_after_s: float | None) -> None:
        super().__init__("status", public_message)
        self.retry_after_s = retry_after_s


class ImageFetcher:
    """Fetches pictures by URL, each over fresh sockets of its own. Safe to share among threads.

    What is more than ``SPOOL_BYTES`` is kept in a file of ``open_file`` while it comes; by default
    that is memory.

    A host that is busy, cannot be reached or breaks off is asked once more, within the deadline:
    half a second later, or when its ``Retry-After`` says, if that is soon.
    """

    def __init__(
        self,
        policy: AddressPolicy,
        *,
        open_file: Callable[[], IO[bytes]] = BytesIO,
        deadline_s: float = 10.0,
        max_bytes: int = 20 * 2**20,
        max_redirects: int = 10,
        resolver: Resolver = resolve,
        connector: Connector = connect,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._open_file = open_file
        self._deadline_s = deadline_s
        self._max_bytes = max_bytes
        self._max_redirects = max_redirects
        self._client = GuardedClient(policy, resolver=resolver, connector=connector)
        self._clock = clock
        self._sleep = sleep

    def fetch(self, url: str) -> bytes:
        """Return the body that ``url`` leads to.

        Raises:
            FetchError: for every reason that lies with the URL, its host or the network.
            OSError: this machine has no room for what comes.
        """
        deadline = Deadline(self._deadline_s, self._clock)
        try:
            return self._follow_twice(url, deadline)
        except _Advised:
            raise
        except FetchError as error:
            advice = _ADVICE.get(error.reason, _USUAL_ADVICE)
            raise _Advised(error.reason, f"{error.public_message} {advice}") from error

    def _follow_twice(self, url: str, deadline: Deadline) -> bytes:
        try:
            return self._follow(url, deadline)
        except FetchError as error:
            pause_s = _pause_after(error)
            if pause_s is None or pause_s >= deadline.remaining_s():
                raise
        self._sleep(pause_s)
        return self._follow(url, deadline)

    def _follow(self, url: str, deadline: Deadline) -> bytes:
        host = ""
        for hop in range(self._max_redirects + 1):
            try:
                target = parse_url(url)
            except FetchError as error:
                if not hop:
                    raise
                # The caller's URL is sound: another host is to blame.
                raise _Advised(
                    error.reason,
                    f"The host {quoted(host)} redirects to a URL that cannot be fetched. "
                    f"{error.public_message} {_ADVICE['redirect']}",
                ) from error
            host = target.host
            exchange = self._client.request(
                "GET",
                target,
                headers=_HEADERS,
                deadline=deadline,
                max_wire_bytes=2 * self._max_bytes + 2**18,  # room for headers and chunk framing
            )
            with exchange as response:
                if response.status not in _REDIRECTS:
                    return self._body(response, target, deadline)
                url = _redirect_url(response, target)
        raise FetchError(
            "redirect", f"The URL redirects more than {self._max_redirects} times (or in a circle)."
        )

    def _body(self, response: httpcore.Response, target: Target, deadline: Deadline) -> bytes:
        _check_answer(response, target)
        if int(_header(response, b"content-length") or 0) > self._max_bytes:
            raise self._too_large(target)
        start, size_bytes, file = BytesIO(), 0, None
        # On disk beyond SPOOL_BYTES: many endless bodies at once must not fill the memory.
        with ExitStack() as files:
            for chunk in response.iter_stream():
                size_bytes += len(chunk)
                if size_bytes > self._max_bytes:
                    raise self._too_large(target)
                deadline.remaining_s()
                if file is None and size_bytes > SPOOL_BYTES:
                    file = files.enter_context(self._open_file())
                    _write_all(file, start.getbuffer())
                if file is None:
                    start.write(chunk)
                else:
                    _write_all(file, chunk)
            if file is None:
                return start.getvalue()
            file.seek(0)
            return file.read()

    def _too_large(self, target: Target) -> FetchError:
        return FetchError(
            "too_large",
            f"The file at host {quoted(target.host)} has more than {self._max_bytes:,} bytes, the "
            "largest that is fetched.",
        )


def _write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:  # a file without a buffer may take a part
        rest = rest[file.write(rest) :]


def _header(response: httpcore.Response, name: bytes) -> str:
    """Its values; bytes that are no UTF-8 are percent-encoded."""
    values = [_text_of(value) for key, value in response.headers if key.lower() == name]
    return ", ".join(values)


def _text_of(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in value)


def _redirect_url(response: httpcore.Response, target: Target) -> str:
    location = _header(response, b"location").strip(" \t")
    try:
        if location and not _CONTROL.search(location):
            return urljoin(target.url, location)
    except ValueError:
        pass
    raise FetchError(
        "redirect",
        f"The host {quoted(target.host)} answered with a redirect (status {response.status}) to "
        "no usable URL.",
    )


def _check_answer(response: httpcore.Response, target: Target) -> None:
    host = quoted(target.host)
    if response.status != 200:
        text = (
            f"The host {host} answered with status {response.status}, not with 200. "
            + _advice_on_status(response.status)
        )
        if response.status in _BUSY:
            raise _Busy(text, _retry_after_s(response))
        raise _Advised("status", text)
    if codings(_header(response, b"content-encoding")):
        raise FetchError(
            "encoding", f"The host {host} compressed its answer though asked for it as it is."
        )


def _retry_after_s(response: httpcore.Response) -> float | None:
    """What ``Retry-After`` says, as seconds from now (RFC 9110, 10.2.3); None for nothing."""
    text = _header(response, b"retry-after").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:  # "-0000", which means UTC of an unknown place
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _pause_after(error: FetchError) -> float | None:
    """How long to wait before the next try; None if there is no point in one."""
    if isinstance(error, _Busy):
        wanted_s = _PAUSE_S if error.retry_after_s is None else error.retry_after_s
        return wanted_s if wanted_s <= _LONGEST_PAUSE_S else None
    return _PAUSE_S if error.reason == "connect" else None


def _advice_on_status(status: int) -> str:
    """Whose fault an answer is, and what to do."""
    if status in (404, 410):
        return f"There is nothing at this URL: check it, or {_ANOTHER_WAY}."
    if status == 429 or status >= 500:
        return f"This is the host's fault, not the URL's: try again later, or {_ANOTHER_WAY}."
    return (
        "Check that the URL opens without a login, and has not expired; where the host lets only "
        f"browsers in, {_ANOTHER_WAY}."
    )
