"""Base64 in pieces: the same bytes as Python's decoder gives for the whole, or the same refusal."""

import base64
import io
import random

import pytest

from e2e.live import a_picture
from redux_server.errors import BadRequest
from redux_server.pictures.inline import MAX_BYTES, decode, decode_into, payload_of

PICTURE = a_picture() + random.Random(0).randbytes(1000)


def in_pieces(text: bytes, size: int) -> bytes:
    file = io.BytesIO()
    chunks = [text[at : at + size] for at in range(0, len(text), size)]
    count = decode_into(file, chunks, "image", len(text))
    assert count == len(file.getvalue())
    return file.getvalue()


@pytest.mark.parametrize("more", [0, 1, 2], ids=["unpadded", "two", "one"])
@pytest.mark.parametrize("size", [1, 3, 4, 7, 64, 10_000])
def test_any_pieces_give_the_whole(size: int, more: int) -> None:
    data = PICTURE + b"x" * ((-len(PICTURE)) % 3 + more)
    plain = base64.b64encode(data)
    assert in_pieces(plain, size) == data
    assert in_pieces(plain.rstrip(b"="), size) == data
    assert in_pieces(base64.urlsafe_b64encode(data), size) == data
    assert in_pieces(base64.encodebytes(data), size) == data
    assert decode(plain.decode()) == data


@pytest.mark.parametrize("size", [1, 4, 9, 10_000])
@pytest.mark.parametrize(
    "wrong",
    [b"\\", b"*", "ü".encode(), b"=", b"==AAAA", b"AA==AAAA"],
    ids=["backslash", "star", "letter", "padding", "more", "groups"],
)
def test_what_is_not_base64_is_refused_in_any_pieces(wrong: bytes, size: int) -> None:
    text = base64.b64encode(PICTURE[: len(PICTURE) // 3 * 3])
    with pytest.raises(BadRequest, match="image must be an http"):
        in_pieces(text + wrong + text, size)


def test_nothing_looks_for_the_head_of_a_data_uri_beyond_its_length() -> None:
    with pytest.raises(BadRequest, match="image must be"):
        payload_of("data:image/png" + ";a" * 10_000 + ",", "image")


def test_a_picture_over_the_limit_is_refused_before_it_is_whole() -> None:
    file = io.BytesIO()
    text = base64.b64encode(PICTURE + bytes(2 * MAX_BYTES))
    chunks = [text[at : at + 2**20] for at in range(0, len(text), 2**20)]
    with pytest.raises(BadRequest, match=r"about 40.0 MiB; allowed are 20 MiB"):
        decode_into(file, chunks, "image", len(text))
    assert len(file.getvalue()) <= MAX_BYTES
