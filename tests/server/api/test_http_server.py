"""What a client may take of a connection, tried with raw sockets at a server in this process."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from redux_server.api.http_server import MAX_HEAD_BYTES, MAX_TARGET_BYTES
from redux_server.api.middleware import BodyLimit
from redux_server.errors import TooSlow
from server.in_process import Impatient, serving

HEAD_S = Impatient.head_s
SLOW_ANSWER_S = 4 * HEAD_S
GET = b"GET /x HTTP/1.1\r\nHost: h\r\n"
PATIENCE_S = 20.0  # of a test for what should take half a second


@dataclass
class Seen:
    """Requests that reached the app, and how reading their bodies ended."""

    paths: list[str] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    headers: list[bytes] = field(default_factory=list)


def an_app(seen: Seen) -> ASGIApp:
    """Answers ``/slow`` late, ``/no`` without reading the body, and others with its length."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.paths.append(scope["path"])
        if scope["path"] == "/slow":
            await asyncio.sleep(SLOW_ANSWER_S)
        if scope["path"] == "/no":
            await PlainTextResponse("no", status_code=401)(scope, receive, send)
            return
        try:
            body = await Request(scope, receive).body()
        except (TooSlow, ClientDisconnect) as error:
            seen.endings.append(type(error).__name__)
            await JSONResponse({}, status_code=408)(scope, receive, send)
            return
        if scope["path"] == "/echo":
            seen.headers = [name for name, _ in scope["headers"]]
            await PlainTextResponse(body)(scope, receive, send)
            return
        await PlainTextResponse(str(len(body)))(scope, receive, send)

    return BodyLimit(app, limit=2**20, patience_s=0.5)


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="module")
def port(seen: Seen) -> Iterator[int]:
    with serving(an_app(seen)) as port:
        yield port


def read_all(client: socket.socket) -> bytes:
    """What the server says until it closes; a reset is a way of closing."""
    said = b""
    try:
        while part := client.recv(65536):
            said += part
    except ConnectionResetError:
        pass
    return said


def talk(port: int, *parts: bytes) -> bytes:
    """Send ``parts`` at once and read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(b"".join(parts))
        return read_all(client)


def drip(port: int, start: bytes, byte: bytes, *, every_s: float = 0.05) -> tuple[float, bytes]:
    """Send ``start``, then ``byte`` for ever: the seconds until the server closed, and its words.

    Fails if it takes ``PATIENCE_S``.
    """
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        started = time.monotonic()
        client.sendall(start)
        client.settimeout(every_s)
        said = b""
        while (passed := time.monotonic() - started) < PATIENCE_S:
            try:
                if not (part := client.recv(65536)):
                    return passed, said
                said += part
            except TimeoutError:
                pass
            except ConnectionResetError:
                return passed, said
            try:
                client.sendall(byte)
            except (BrokenPipeError, ConnectionResetError):
                return passed, said
        raise AssertionError(f"still open after {passed:.1f} s, said {said!r}")


def refusal(said: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"connection: close" in head and b"content-type: application/json" in head, said
    return int(head.split()[1]), json.loads(body)


# --- the size of heads ----------------------------------------------------------------------------


def test_head_of_a_usual_size_passes(port: int) -> None:
    headers = b"".join(b"X-%d: %b\r\n" % (number, b"v" * 200) for number in range(90))
    assert len(headers) < MAX_HEAD_BYTES
    assert talk(port, GET, headers, b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_target_of_the_largest_size_passes(port: int) -> None:
    target = b"/" + b"a" * (MAX_TARGET_BYTES - 1)
    said = talk(port, b"GET " + target, b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("head", "status", "says"),
    [
        (b"GET /" + b"a" * MAX_TARGET_BYTES + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414, "The URL has"),
        (GET + b"X: 1\r\n" * 100 + b"\r\n", 431, "101 headers"),
        (GET + b"X: " + b"v" * MAX_HEAD_BYTES + b"\r\n\r\n", 431, "larger"),
        (GET + b"".join(b"X: " + b"v" * 900 + b"\r\n" for _ in range(40)) + b"\r\n", 431, "larger"),
        (GET + b"X: " + b"v" * (MAX_HEAD_BYTES + 1), 431, "larger"),
        (b"GET /" + b"a" * (MAX_HEAD_BYTES + 1), 431, "larger"),
        (b"X" * 40, 400, "not a valid HTTP/1.1 request"),
        (b"\x16\x03\x01\x02\x00\x01", 400, "not a valid"),
        (b"GET /x HTTP/1.1\r\nHost: h\r\nX Y: 1\r\n\r\n", 400, "not a valid"),
        (GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "not a valid"),
        (GET + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "not a valid"),
        (GET + b"Content-Length: -1\r\n\r\n", 400, "not a valid"),
        (GET + b"Content-Length: 99999999999999999999\r\n\r\n", 400, "not a valid"),
        (b"GET \xff HTTP/1.1\r\nHost: h\r\n\r\n", 400, "not a valid"),
        (b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n", 400, "not a valid"),
    ],
)
def test_unusual_head_is_refused_before_the_app_sees_it(
    port: int, seen: Seen, head: bytes, status: int, says: str
) -> None:
    before = list(seen.paths)
    got, body = refusal(talk(port, head))
    assert got == body["code"] == status
    assert says in body["message"] and body["error"] == body["message"] and body["data"] is None
    assert seen.paths == before


def test_endless_header_is_cut_off_early(port: int) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(GET + b"X: ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while sent < 64 * 2**20:
                sent += client.send(b"v" * 65536)
    assert sent < 32 * 2**20, "the kernel's buffers, not ours"


def test_second_request_of_a_connection_is_measured_for_itself(port: int) -> None:
    padding = b"X: " + b"v" * (MAX_HEAD_BYTES // 2) + b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        for _ in range(5):
            client.sendall(GET + padding)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")


# --- the time of heads ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "byte"),
    [(b"", b""), (b"GET /x HTTP/1.1\r\nX: ", b"v"), (GET, b"A: b\r\n"), (b"", b"\r\n")],
    ids=["silence", "a header that goes on", "header after header", "empty lines"],
)
def test_head_that_does_not_end_is_given_up(port: int, start: bytes, byte: bytes) -> None:
    seconds, said = drip(port, start, byte)
    assert seconds > 0.5 * HEAD_S
    assert said == b""


def test_dripping_between_two_requests_is_given_up(port: int) -> None:
    _, said = drip(port, GET + b"\r\n", b"\r\n")
    assert said.count(b"HTTP/1.1 200") == 1


def test_answer_that_takes_longer_than_a_head_may_is_waited_for(port: int) -> None:
    request = b"GET /slow HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    started = time.monotonic()
    assert talk(port, request).startswith(b"HTTP/1.1 200")
    assert time.monotonic() - started > SLOW_ANSWER_S * 0.9


def test_pipelined_requests_are_all_answered(port: int) -> None:
    requests = b"GET /slow HTTP/1.1\r\nHost: h\r\n\r\n" + (GET + b"\r\n") * 3
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(requests)
        assert read_all(client).count(b"HTTP/1.1 200") == 4


# --- offers of another protocol, which are not taken ----------------------------------------------


OFFERS = {
    "h2c of Java and curl": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n",
    "TLS of Apache": b"Connection: upgrade\r\nUpgrade: TLS/1.2\r\n",
    "websocket": b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "several": b"connection: keep-alive, Upgrade\r\nupgrade: h2c, websocket/13, IRC/6.9\r\n",
    "two headers": b"Connection: keep-alive\r\nConnection: upgrade\r\nUpgrade: a\r\nUpgrade: b\r\n",
    "empty": b"Connection: Upgrade\r\nUpgrade: x\r\nUpgrade:\r\n",
}
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


def framed(body: bytes, framing: str) -> bytes:
    """The rest of a head, and a body, by its length or in chunks."""
    if framing == "length":
        return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    cut = len(body) // 2
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in (body[:cut], body[cut:]))
    return b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def answers(said: bytes) -> list[bytes]:
    """The bodies of the answers in ``said``, all of them good."""
    heads = said.split(b"HTTP/1.1 ")
    assert not heads[0] and all(head.startswith(b"200") for head in heads[1:]), said
    return [head.partition(b"\r\n\r\n")[2] for head in heads[1:]]


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_offer_is_ignored_wherever_its_request_is_cut(
    port: int, seen: Seen, offer: bytes, framing: str
) -> None:
    request = b"POST /echo HTTP/1.1\r\nHost: h\r\n" + offer + framed(SMUGGLED, framing)
    last = GET + b"Connection: close\r\n\r\n"
    body_at = request.index(b"\r\n\r\n") + 4
    seen.paths.clear()
    cuts = [*range(body_at - 5, body_at + 5), 30, len(request) - 1, len(request)]
    for cut in cuts:
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(request[:cut])
            time.sleep(0.002)  # so that it may arrive in two packets; either way it must be read
            client.sendall(request[cut:] + last)
            assert answers(read_all(client)) == [SMUGGLED, b"0"], cut
    assert set(seen.paths) == {"/echo", "/x"}, "a body ran as a request"
    assert not {b"upgrade", b"http2-settings"} & set(seen.headers)


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_offers_in_a_pipeline_are_answered_in_order(port: int, seen: Seen, offer: bytes) -> None:
    seen.paths.clear()
    one = b"POST /echo HTTP/1.1\r\nHost: h\r\n" + offer
    bodies = [b"%d" % number + SMUGGLED for number in range(20)]
    sent = [one + framed(body, ("length", "chunks")[i % 2]) for i, body in enumerate(bodies)]
    plain = GET + offer + b"\r\n"  # an offer without a body
    said = talk(port, *sent, plain, GET, b"Connection: close\r\n\r\n")
    assert answers(said) == [*bodies, b"0", b"0"]
    assert "/smuggled" not in seen.paths


def test_offer_whose_client_waits_for_100_continue_is_told_to_go_on(port: int) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n"
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(head + OFFERS["h2c of Java and curl"] + b"\r\n")
        assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"body" + GET + b"Connection: close\r\n\r\n")
        assert answers(read_all(client)) == [b"body", b"0"]


def test_offer_in_http_1_0_is_ignored_too(port: int) -> None:
    head = (
        b"POST /echo HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 4\r\n\r\n"
    )
    assert answers(talk(port, head, b"body")) == [b"body"]


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"X: " + b"v" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
        (b"X: 1\r\n" * 100 + b"\r\n", 431),
        (b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    ],
)
def test_offer_is_bounded_and_parsed_as_any_other_request(
    port: int, seen: Seen, rest: bytes, status: int
) -> None:
    before = list(seen.paths)
    said = talk(port, b"POST /no HTTP/1.1\r\nHost: h\r\n", OFFERS["websocket"], rest, SMUGGLED)
    assert f"HTTP/1.1 {status}".encode() in said
    assert "/smuggled" not in seen.paths[len(before) :]


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_body_after_an_offer_has_no_longer_than_others(port: int, offer: bytes) -> None:
    start = b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n" + offer + b"\r\n"
    _, said = drip(port, start, b"v")
    assert said.startswith(b"HTTP/1.1 408")


# --- bodies ---------------------------------------------------------------------------------------


CHUNKED = b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "byte"),
    [
        (b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n", b"v"),
        (b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n", b""),
        (CHUNKED, b"1\r\nv\r\n"),
        (CHUNKED, b""),
    ],
)
def test_body_that_does_not_come_is_given_up(
    port: int, seen: Seen, start: bytes, byte: bytes
) -> None:
    seen.endings.clear()
    _, said = drip(port, start, byte)
    assert said.startswith(b"HTTP/1.1 408")
    assert seen.endings == ["TooSlow"]


@pytest.mark.parametrize("byte", [b"1\r\nv\r\n", b""])
def test_body_that_nobody_wants_is_not_read_for_ever(port: int, byte: bytes) -> None:
    start = b"POST /no HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    _, said = drip(port, start, byte)
    assert said.startswith(b"HTTP/1.1 401")


def test_refusal_reaches_a_client_that_sends_its_body_first(port: int) -> None:
    body = b"v" * 2**19
    head = b"POST /no HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(head % len(body))
        time.sleep(0.1)
        assert client.recv(65536).startswith(b"HTTP/1.1 401")


def test_client_that_goes_away_within_its_body_ends_the_request(port: int, seen: Seen) -> None:
    seen.endings.clear()
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\nbegun")
    ends_at = time.monotonic() + PATIENCE_S
    while not seen.endings and time.monotonic() < ends_at:
        time.sleep(0.02)
    assert seen.endings[0] in ("ClientDisconnect", "TooSlow")
