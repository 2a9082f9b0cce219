"""No request keeps the event loop: all routes, with all that is long, deep, wide, repeated or cut.

Counted is what a callback of the loop takes of its thread's processor time, which other processes
do not lengthen. How long ``/livez`` waits is measured by ``make bench-hostile``.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from e2e.live import a_picture, data_uri
from redux_server.api import bodies
from server.in_process import SUBMIT, Api, submit

LONGEST_S = 0.25
HEAD = 15 * 2**10  # what the HTTP server lets through in a path, a query or a header
BODY = 3 * 2**20
QUOTE, BACKSLASH = b'"', b"\\"
JSON = (b"content-type", b"application/json")
FORM = (b"content-type", b"multipart/form-data; boundary=b")
NAMES = (
    *(b"image", b"images", b"image_weights", b"prompt", b"seed", b"size", b"ids", b"page"),
    *(b"start_time", b"created_after", b"prediction_uuids", b"model"),
)
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
Headers = Sequence[tuple[bytes, bytes]]


def repeated(unit: bytes, size: int) -> bytes:
    return unit * (size // len(unit))


UNITS = (
    *(b"a", b"1", b"%", b"%41", b";", b";a=b", b"=", b"&a=b", b",", b":", b"/", b"../", b"@"),
    *(b"\\", b'"', b" ", b"[", b"{", b"\xff", b"\xc2\xb2", b"data:", b"http://", b"bytes=0-1,"),
)


def bodies_of(size: int) -> Iterator[bytes]:
    """JSON, what begins like it, and forms."""
    for unit in UNITS:
        yield repeated(unit, size)
        yield b'{"image": "' + repeated(unit, size).replace(QUOTE, BACKSLASH + QUOTE) + b'"}'
        yield b'{"image": "data:' + repeated(unit, size).replace(QUOTE, b"'")
    yield b'{"image": "' + repeated(BACKSLASH + QUOTE, size) + b'"}'
    yield b'{"image": "' + repeated(b"\\u0041", size) + b'"}'
    deep = size // 2
    yield b"[" * deep + b"]" * deep
    yield b'{"a":' * (deep // 4) + b"1" + b"}" * (deep // 4)
    for name in NAMES:
        yield b'{"image": "a", "%b": [' % name + repeated(b"1,", size) + b"1]}"
        yield b'{"image": "a", "%b": [' % name + repeated(b'"a",', size) + b'"a"]}'
        yield b'{"image": "a", "%b": ' % name + b"9" * size + b"}"
        yield b'{"image": "a", "%b": "' % name + b"9" * size + b'"}'
    yield b"{" + b",".join(b'"k%d":1' % number for number in range(size // 12)) + b"}"
    for unit in UNITS:
        yield FILE + repeated(unit, size)
    yield FILE + repeated(b"\r\n--a", size) + b"\r\n--b--\r\n"
    yield repeated(b"--b\r\nContent-Disposition: form-data; name=x\r\n\r\n1\r\n", size)
    yield b"--b\r\nContent-Disposition: form-data; name=" + repeated(b'";', size)


class Caller:
    """Calls the app as its HTTP server does, piece by piece, and leaves before the end if told."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._key = (b"authorization", b"Bearer " + api.key.encode())

    def __call__(
        self,
        method: str,
        path: bytes,
        *,
        query: bytes = b"",
        headers: Headers = (),
        body: bytes = b"",
        is_cut: bool = False,
    ) -> int:
        """The status of the answer; 0 for none."""
        pieces = [body[at : at + 2**16] for at in range(0, len(body), 2**16)] or [b""]
        messages = [
            {"type": "http.request", "body": piece, "more_body": is_cut or piece is not pieces[-1]}
            for piece in pieces
        ]
        status = 0

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0)
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        scope = {
            "type": "http", "http_version": "1.1", "scheme": "http", "method": method,
            "path": path.decode("latin-1"), "raw_path": path, "query_string": query,
            "root_path": "", "server": ("test", 80), "client": ("test", 1),
            "headers": [(b"host", b"test"), self._key, *headers],
        }  # fmt: skip
        self._api._runner.run(self._call(scope, receive, send))
        return status

    async def _call(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(300):
                await self._api.app(scope, receive, send)
        except Exception as error:
            assert not isinstance(error, TimeoutError), "no answer"


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The processor seconds of the longest callback so far, as the only element."""
    found = [0.0]
    run = asyncio.Handle._run

    def measured(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        try:
            run(handle)
        finally:
            found[0] = max(found[0], time.thread_time() - began)

    monkeypatch.setattr(asyncio.Handle, "_run", measured)
    return found


@pytest.fixture
def caller(api: Api) -> Caller:
    return Caller(api)


def routes(api: Api) -> list[tuple[str, str]]:
    found = [each for each in api.app.routes if isinstance(each, Route | APIRoute)]
    return sorted({(method, each.path) for each in found for method in each.methods or ()})


def test_long_paths_queries_and_headers_keep_nobody_waiting(
    api: Api, caller: Caller, longest: list[float]
) -> None:
    names = (b"range", b"if-none-match", b"if-range", b"x-request-id", b"idempotency-key",
             b"last-event-id", b"content-type", b"accept", b"origin", b"cookie",
             b"access-control-request-headers", b"traceparent")  # fmt: skip
    chance = random.Random(0)
    for method, path in routes(api):
        for unit in chance.sample(UNITS, 6):
            text = repeated(unit, HEAD)
            filled = path.encode()
            for name in (b"{task_id}", b"{path:path}", b"{ticket}", b"{upload_id}", b"{version}"):
                filled = filled.replace(name, text)
            caller(method, filled)
            plain = path.encode()
            caller(method, plain, query=text)
            caller(method, plain, query=b"webhook=" + text + b"&page=" + text)
            caller(method, plain, headers=[(name, text[:2000]) for name in names])
    assert longest[0] < LONGEST_S


SIZES = (2**10, 60 * 2**10, 250 * 2**10)


@pytest.mark.parametrize("is_cut", [False, True])
def test_bodies_of_every_shape_keep_nobody_waiting(
    api: Api, caller: Caller, longest: list[float], is_cut: bool
) -> None:
    paths = [path.encode() for method, path in routes(api) if method in ("POST", "PUT")]
    shapes = [body for size in SIZES for body in bodies_of(size)]
    chance = random.Random(1)
    for path in paths:
        for body in chance.sample(shapes, 12 if is_cut else 25):
            kind = FORM if body.startswith(b"--b") else JSON
            caller("POST", path, headers=[kind], body=body, is_cut=is_cut)
    assert longest[0] < LONGEST_S


@pytest.mark.parametrize("seed", range(4))
def test_submits_of_megabytes_keep_nobody_waiting(
    api: Api, caller: Caller, longest: list[float], seed: int
) -> None:
    shapes = list(bodies_of(BODY))[seed::4]
    for body in shapes:
        caller("POST", SUBMIT.encode(), headers=[JSON], body=body)
    assert longest[0] < LONGEST_S


def test_forms_of_megabytes_keep_nobody_waiting(
    api: Api, caller: Caller, longest: list[float]
) -> None:
    for body in bodies_of(BODY):
        if body.startswith(b"--b"):
            caller("POST", b"/api/v3/media/upload/binary", headers=[FORM], body=body)
    whole = FILE + a_picture() + bytes(BODY) + b"\r\n--b--\r\n"
    assert caller("POST", b"/api/v3/media/upload/binary", headers=[FORM], body=whole) == 200
    assert longest[0] < LONGEST_S


def test_a_callback_that_keeps_the_loop_is_found_out(
    build_api: Callable[..., Api], longest: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large bodies parsed where they come: the fault that these tests are there for."""
    monkeypatch.setattr(bodies, "SMALL_BYTES", 2**30)
    monkeypatch.setattr(bodies, "QUICK_BYTES", 2**30)
    caller = Caller(build_api())
    body = b'{"image": "a", "x": [' + b"[1]," * (3 * 2**19) + b"1]}"
    caller("POST", SUBMIT.encode(), headers=[JSON], body=body)
    assert longest[0] > LONGEST_S


def test_honest_requests_are_answered_all_the_same(api: Api, caller: Caller) -> None:
    body = b'{"image": "%b"}' % data_uri(a_picture()).encode()
    assert caller("POST", SUBMIT.encode(), headers=[JSON], body=body) == 200
    assert submit(api)["status"] == "created"
