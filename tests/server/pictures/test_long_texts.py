"""Large JSON documents: the same as json.loads reads them, but for long texts, left on the disk."""

import base64
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redux_server.pictures.long_texts import (
    LONG_BYTES,
    MAX_REST_BYTES,
    LongTexts,
    RestTooLarge,
    set_aside,
)

LONG = base64.b64encode(random.Random(0).randbytes(LONG_BYTES)).decode()
OTHER = base64.b64encode(random.Random(1).randbytes(LONG_BYTES)).decode()


_files = ExitStack()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    _files.close()


def file_of(document: bytes) -> IO[bytes]:
    file = _files.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
    file.write(document)
    return file


def parse(document: bytes) -> tuple[Any, LongTexts]:
    rest, texts = set_aside(file_of(document), len(document))
    assert len(rest) <= MAX_REST_BYTES
    return json.loads(rest), texts


def whole(text: str, texts: LongTexts) -> str:
    """``text`` with the long one in the place of what stands for it."""
    for short in texts.spans:
        if text.endswith(short):
            return text.removesuffix(short) + b"".join(texts.chunks(short)).decode()
    return text


def restored(value: Any, texts: LongTexts) -> Any:
    if isinstance(value, str):
        return whole(value, texts)
    if isinstance(value, list):
        return [restored(each, texts) for each in value]
    if isinstance(value, dict):
        return {whole(name, texts): restored(each, texts) for name, each in value.items()}
    return value


TEXTS = st.sampled_from(['a"b', "\\", '\\"', "ü€", "", "data:,", LONG, OTHER]) | st.text(max_size=9)
LONG_URIS = st.sampled_from([f"data:image/png;base64,{LONG}", f"DATA:;base64,{OTHER}"])
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS | LONG_URIS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.booleans())
def test_a_document_says_what_it_says_and_its_long_texts_are_found(
    document: Any, is_ascii: bool
) -> None:
    written = json.dumps(document, ensure_ascii=is_ascii).encode(errors="surrogatepass")
    value, texts = parse(written)
    assert restored(value, texts) == document


def test_equal_texts_stay_equal_and_a_text_may_end_in_another() -> None:
    uri = f"data:image/png;base64,{LONG}"
    value, texts = parse(json.dumps([LONG, LONG, OTHER, uri]).encode())
    first, again, other, with_head = value
    assert first == again != other
    assert with_head == f"data:image/png;base64,{first}"
    assert len(texts.spans) == 2
    assert all(texts.is_in(each) for each in value)
    assert first in texts and with_head not in texts
    assert texts.size_bytes(first) == len(LONG)


@pytest.mark.parametrize(
    ("written", "meant"),
    [(r"\/", "/"), (r"\u002B", "+"), (r"\u002b", "+"), (r"\u002F", "/"), (r"\n", "\n")],
)
def test_escapes_of_base64_are_resolved_wherever_a_piece_ends(
    written: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As json_encode of PHP and System.Text.Json write it."""
    text = ("A" * 7 + meant) * (LONG_BYTES // 6)
    document = f'{{"image": "{text.replace(meant, written)}"}}'.encode()
    assert json.loads(document) == {"image": text}
    for size in (5, 8, 13, 2**20):
        monkeypatch.setattr("redux_server.pictures.long_texts._CHUNK_BYTES", size * 100 + 1)
        value, texts = parse(document)
        assert restored(value, texts) == {"image": text}


def hostile() -> Iterator[Any]:
    size = 2 * 2**20
    yield pytest.param(b'{"x":[' + b"[]," * (size // 3) + b"0]}", id="many lists")
    yield pytest.param(b"[" * size, id="deep")
    yield pytest.param(b" " * size, id="blanks")
    yield pytest.param(b"1" * size, id="one number")
    yield pytest.param(b"{" + b",".join(b'"%x":1' % i for i in range(200_000)) + b"}", id="keys")
    yield pytest.param(b'"' + b'\\"' * size + b'"', id="escaped quotes")
    yield pytest.param(b'"' + b"\\" * size + b'"', id="backslashes")
    yield pytest.param(b'"' * size, id="empty texts")


@pytest.mark.parametrize("document", list(hostile()))
def test_what_is_no_long_text_is_bounded(document: bytes) -> None:
    with pytest.raises(RestTooLarge):
        set_aside(file_of(document), len(document))


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/" + "a" * LONG_BYTES,
        "data:image/png" + ";a" * LONG_BYTES,
        "Note: " + '"\\' * (LONG_BYTES // 2),
        "Notice: \u00e4" + "\u20ac" * LONG_BYTES,
    ],
    ids=["url", "data", "escapes", "letters"],
)
def test_of_what_is_no_base64_enough_is_left_to_see_it(text: str) -> None:
    for is_ascii in (True, False):
        value, texts = parse(json.dumps({"image": text}, ensure_ascii=is_ascii).encode())
        shown, _, digest = value["image"].partition("\0")
        assert texts.is_in(value["image"]) and len(digest) == 64
        assert shown[:6] == text[:6]
        assert "https" not in text or 8192 < len(shown) < 10_000


def test_a_text_that_does_not_end_is_no_json() -> None:
    document = b'{"image": "' + LONG.encode()
    with pytest.raises(ValueError, match="Unterminated string"):
        parse(document)
