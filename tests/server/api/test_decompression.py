"""Compressed bodies: what they hold is read, whatever they claim, and within the same limits."""

import gzip
import json
import os
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from redux_server.api.app import BODY_LIMIT
from redux_server.net.content_coding import MAX_MEMBERS
from server.in_process import INLINE, SUBMIT, URL, Api

PLAIN = json.dumps({**URL, "prompt": "a red fox"}).encode()


def bare(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def two_members(data: bytes) -> bytes:
    return gzip.compress(data[:20]) + gzip.compress(data[20:])


CODED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "in capitals": ("GZIP", gzip.compress),
    "two members": ("gzip", two_members),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", bare),
    "identity too": ("identity, gzip", gzip.compress),
    "as it is": ("identity", bytes),
    "meaningless": ("utf-8", bytes),
    "aws-chunked": ("aws-chunked", bytes),
    "base64": ("base64", bytes),
    "none": ("none", bytes),
    "empty": ("", bytes),
}


def post(api: Api, body: bytes, coding: str, *, in_chunks: int = 0) -> "tuple[int, dict]":  # type: ignore[type-arg]
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}

    async def pieces() -> "Iterator[bytes]":  # type: ignore[misc]
        for at in range(0, len(body), in_chunks):
            yield body[at : at + in_chunks]

    content = pieces() if in_chunks else body
    answer = api.post(SUBMIT, content=content, headers=headers)
    return answer.status_code, answer.json()


@pytest.mark.parametrize("in_chunks", [0, 1, 7])
@pytest.mark.parametrize(("coding", "pack"), CODED.values(), ids=CODED)
def test_body_is_what_it_holds(
    api: Api, coding: str, pack: Callable[[bytes], bytes], in_chunks: int
) -> None:
    status, answer = post(api, pack(PLAIN), coding, in_chunks=in_chunks)
    assert status == 200, answer
    assert answer["data"]["input"]["prompt"] == "a red fox"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_large_body_goes_through_the_disk_and_is_the_same(api: Api, coding: str) -> None:
    noise = os.urandom(300_000).hex()  # is not compressed to nothing
    plain = json.dumps({**INLINE, "ignored": noise}).encode()
    packed = gzip.compress(plain) if coding == "gzip" else zlib.compress(plain)
    status, answer = post(api, packed, coding, in_chunks=65536)
    assert status == 200, answer


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (PLAIN, "gzip"),
        (gzip.compress(PLAIN)[:-9], "gzip"),
        (gzip.compress(PLAIN)[:1], "gzip"),
        (gzip.compress(PLAIN) + b"more", "gzip"),
        (zlib.compress(PLAIN) + b"more", "deflate"),
        (zlib.compress(PLAIN)[:-1], "deflate"),
        (b"\xff" * 40, "deflate"),
    ],
    ids=["plain", "cut", "a byte", "more", "more", "cut", "noise"],  # gzip has the time in it
)
def test_broken_body_is_the_callers_fault(api: Api, body: bytes, coding: str) -> None:
    status, answer = post(api, body, coding)
    assert status == 400
    assert f"no complete {coding}" in answer["message"]


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip, br"])
def test_other_codings_are_named(api: Api, coding: str) -> None:
    answer = api.post(SUBMIT, content=b"x", headers={"Content-Encoding": coding})
    assert answer.status_code == 415 and answer.json()["error_code"] == "unsupported_coding"
    assert coding in answer.json()["message"]
    assert answer.headers["accept-encoding"] == "gzip, deflate"


@cache
def _bomb() -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    zeros = b"0" * 2**20
    return b"".join(packer.compress(zeros) for _ in range(200)) + packer.flush()


@pytest.mark.parametrize(
    "path", [SUBMIT, "/api/v3/media/uploads", "/api/v3/media/upload/binary", "/api/v3/predictions"]
)
def test_bomb_is_refused_on_every_path_and_takes_no_memory(api: Api, path: str) -> None:
    bomb = _bomb()
    assert len(bomb) < 2**20 < BODY_LIMIT < 200 * 2**20
    tracemalloc.start()
    answer = api.post(
        path,
        content=bomb,
        headers={"Content-Encoding": "gzip", "Content-Type": "multipart/form-data; boundary=x"},
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status_code in (400, 413), answer.text  # a form is no form before it is too long
    assert peak < 24 * 2**20


def test_members_of_gzip_are_few_and_no_more_are_opened(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million empty ones in 20 MiB would keep the event loop busy for seconds."""
    opened = []
    real = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", lambda *a: opened.append(a) or real(*a))
    empty = gzip.compress(b"", mtime=0)
    whole = gzip.compress(PLAIN, mtime=0)
    status, answer = post(api, whole + empty * (MAX_MEMBERS - 1), "gzip")
    assert status == 200, answer
    opened.clear()
    status, answer = post(api, empty * 100_000 + whole, "gzip", in_chunks=2**18)
    assert status == 400 and "no complete gzip" in answer["message"]
    assert len(opened) == MAX_MEMBERS


def test_refusal_for_want_of_a_key_comes_first(api: Api) -> None:
    answer = api.post(SUBMIT, key="", content=b"x", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 401


def test_uploaded_file_may_come_compressed(api: Api) -> None:
    picture = b"\x89PNG\r\n\x1a\n" + bytes(64)
    ticket = api.post("/api/v3/media/uploads", json={"filename": "a.png", "size": len(picture)})
    path = ticket.json()["data"]["upload"]["url"].removeprefix("http://test")
    packed = gzip.compress(picture)
    answer = api.request("PUT", path, key="", content=packed, headers={"Content-Encoding": "gzip"})
    assert answer.status_code in (200, 400) and "length" not in answer.text.lower(), answer.text
