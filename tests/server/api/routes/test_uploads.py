"""Multipart bodies, right and hostile: what is handed on of them, and what is refused when."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from redux_server.api.routes.uploads import MAX_PARTS, read_file
from redux_server.errors import BadRequest

BOUNDARY = "xYzZY"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"
DATA = bytes(range(256)) * 40 + b"\r\n--xYzZ\r\n--not"  # with what looks like a boundary


def part(name: str, data: bytes, *, file_name: str = "", more: bytes = b"") -> bytes:
    given = f'; filename="{file_name}"' if file_name else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{given}\r\n'.encode()
    return head + more + b"\r\n" + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
GOOD = part("a", b"1") + part("file", DATA, file_name="a.png") + part("b", b"2") + END


def read(body: bytes, content_type: str = TYPE, *, size: int = 65536) -> tuple[str, bytes, int]:
    """The file's name and bytes, and how many bytes of the body were taken."""
    found, taken = bytearray(), 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal taken
        for at in range(0, len(body), size):
            piece = body[at : at + size]
            taken += len(piece)
            yield piece

    async def write(data: bytes) -> None:
        found.extend(data)

    name = asyncio.run(read_file(content_type, chunks(), write))
    return name, bytes(found), taken


@pytest.mark.parametrize("size", [1, 7, 100, 65536])
def test_file_is_handed_on_whatever_the_pieces(size: int) -> None:
    assert read(GOOD, size=size) == ("a.png", DATA, len(GOOD))


def test_form_of_a_known_client_is_understood() -> None:
    import httpx

    request = httpx.Request("POST", "http://x/", files={"file": ("ä b.png", DATA)}, data={"k": "v"})
    name, data, _ = read(request.read(), request.headers["content-type"])
    assert (name, data) == ("ä b.png", DATA)


def test_file_without_a_name_is_one() -> None:
    assert read(part("file", b"x") + END)[:2] == ("upload", b"x")


@pytest.mark.parametrize(
    "content_type",
    ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=",
     "multipart/mixed; boundary=xYzZY", "multipart/form-data; boundary=" + "x" * 5000,
     "\x00\xff;;;=", "image/png"],
)  # fmt: skip
def test_no_form_is_told_how_to_send_one(content_type: str) -> None:
    with pytest.raises(BadRequest, match=r'field "file", such as curl'):
        read(GOOD, content_type)


@pytest.mark.parametrize(
    "body",
    [b"", b"no form at all", GOOD[:-10], GOOD[: len(GOOD) // 2], GOOD[:30], b"--xYzZY",
     b"--other\r\n\r\nx\r\n--other--\r\n", b"\x89PNG\r\n\x1a\n" * 50,
     b"--xYzZY\r\nno colon\r\n\r\nx\r\n" + END, b"--xYzZY\r\n\x00: x\r\n\r\nx\r\n" + END],
)  # fmt: skip
def test_form_that_is_broken_or_cut_short_is_refused(body: bytes) -> None:
    for size in (1, 65536):
        with pytest.raises(BadRequest, match=r"cannot be read|closing boundary"):
            read(body, size=size)


@pytest.mark.parametrize("found", [part("image", DATA, file_name="a.png"), part("a", b"x")])
def test_form_without_the_field_is_told_what_it_has(found: bytes) -> None:
    with pytest.raises(BadRequest, match=r"has '(image|a)', and no field \"file\""):
        read(found + END)


def test_form_with_two_files_is_refused() -> None:
    with pytest.raises(BadRequest, match="one file a request"):
        read(part("file", b"x", file_name="a") * 2 + END)


def test_endless_headers_are_refused_before_they_have_come() -> None:
    head = f"--{BOUNDARY}\r\n".encode()
    for body in (head + b"X: " + b"a" * 10**6, head + b"a" * 10**6, head + b"A: b\r\n" * 10**5):
        with pytest.raises(BadRequest, match="cannot be read"):
            read(body, size=1000)
        taken = 0
        with pytest.raises(BadRequest):  # the very same in less than a hundredth of it
            taken = read(body[:20_000], size=1000)[2]
        assert taken == 0


def test_many_parts_are_refused() -> None:
    assert read(part("a", b"x") * (MAX_PARTS - 1) + part("file", b"y") + END)[1] == b"y"
    with pytest.raises(BadRequest, match=f"more than {MAX_PARTS} parts"):
        read(part("a", b"x") * 100_000)


def test_what_follows_the_end_is_dropped() -> None:
    assert read(GOOD + b"epilogue " * 1000)[1] == DATA
