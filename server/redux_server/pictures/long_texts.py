"""A large JSON document whose long texts stay on the disk, where they came to lie.

A submit is some KiB of parameters, and pictures in base64 of up to 20 MiB. Only the former are
parsed: in the place of each long text stands a short one, by which the long one is found again. So
neither memory nor time grows with what a caller sends. Knows no parameters and no HTTP.
"""

import hashlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from redux_server.pictures.data_uri import HEAD_LENGTH, payload_start

LONG_BYTES = 64 * 2**10
"""A text of more stays where it is."""
MAX_REST_BYTES = 256 * 2**10
"""Of a document, beside its long texts."""
_MAX_QUOTES = 2**16  # in a document that has long texts
_MAX_BACKSLASHES = 2**10  # in a row
_SHOWN_BYTES = 9000  # more than any URL may have
_CHUNK_BYTES = 2**20
_QUOTE, _BACKSLASH = b'"', ord("\\")
# What serialisers, of PHP and .NET among them, write for characters of base64 and its line breaks.
_ESCAPES = (
    *((rb"\/", b"/"), (rb"\n", b"\n"), (rb"\r", b"\r"), (rb"\t", b"\t")),
    *((rb"\u002B", b"+"), (rb"\u002b", b"+"), (rb"\u002F", b"/"), (rb"\u002f", b"/")),
    *((rb"\u003D", b"="), (rb"\u003d", b"=")),
    *((rb"\u0025", b"%"), (rb"\u0020", b" "), (rb"\f", b"\f")),
)
_LONGEST_ESCAPE = 6
_ASCII = bytes(each if each < 128 else ord("?") for each in range(256))
_Span = tuple[int, int]


class RestTooLarge(ValueError):
    """More than ``MAX_REST_BYTES`` beside the long texts, or a text that is mostly escapes."""


@dataclass(frozen=True, slots=True)
class LongTexts:
    """Where in ``file`` the long texts are, by the short ones that stand for them.

    A short one is a zero and the SHA-256 of the long one, after the head of a data URI as it is. So
    texts that are equal stay equal, and one that ends in another still does.
    """

    file: IO[bytes] | None = None
    spans: dict[str, _Span] = field(default_factory=dict)

    def __contains__(self, text: str) -> bool:
        """Whether ``text`` stands for a long one."""
        return text in self.spans

    def is_in(self, text: str) -> bool:
        """Whether ``text`` is one that stands for a long one, or ends in it as a data URI does."""
        return any(text.endswith(each) for each in self.spans)

    def size_bytes(self, text: str) -> int:
        """Of the long text that ``text`` stands for, as JSON has it."""
        start, end = self.spans[text]
        return end - start

    def chunks(self, text: str) -> Iterator[bytes]:
        """The long text that ``text`` stands for, without the escapes that base64 may have."""
        assert self.file is not None
        at, end = self.spans[text]
        cut = b""
        while at < end:
            chunk = os.pread(self.file.fileno(), min(_CHUNK_BYTES, end - at), at)
            at += len(chunk)
            chunk, cut = _split_cut_escape(cut + chunk)
            yield _unescaped(chunk)
        yield _unescaped(cut)


def set_aside(file: IO[bytes], size_bytes: int) -> tuple[bytes, LongTexts]:
    """The document of ``size_bytes`` in ``file`` with short texts for long ones, and those.

    Looks at quotes alone: whether the rest is JSON is for a parser to say.

    Raises:
        RestTooLarge: most of it is no long text.
    """
    texts = LongTexts(file)
    pieces: list[bytes] = []
    with mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_READ) as data:
        room, at, quotes = MAX_REST_BYTES, 0, iter(range(_MAX_QUOTES))
        while at < size_bytes:
            piece, at = _next_piece(data, at, room, quotes, texts)
            room -= len(piece)
            pieces.append(piece)
    return b"".join(pieces), texts


def _next_piece(
    data: mmap.mmap, at: int, room: int, quotes: Iterator[int], texts: LongTexts
) -> tuple[bytes, int]:
    """All from ``at`` to the end of the next text, which is set aside if it is long."""
    start = data.find(_QUOTE, at, at + room + 1) + 1
    if not start:
        if len(data) - at > room:
            raise RestTooLarge
        return data[at:], len(data)
    end = _end_of_text(data, start, quotes)
    text = _short(data, start, end, texts) if end - start > LONG_BYTES else data[start:end]
    piece = data[at:start] + text + data[end : end + 1]
    if len(piece) > room:
        raise RestTooLarge
    return piece, end + 1


def _end_of_text(data: mmap.mmap, start: int, quotes: Iterator[int]) -> int:
    """Where the quote is that ends the text from ``start`` on; the document's end if none does.

    Looks at no more than ``quotes``, which are those of the whole document.
    """
    at = start
    for _ in quotes:
        end = data.find(_QUOTE, at)
        if end < 0:
            return len(data)
        if not _is_escaped(data, start, end):
            return end
        at = end + 1
    raise RestTooLarge


def _is_escaped(data: mmap.mmap, start: int, end: int) -> bool:
    """Whether an odd number of backslashes stands before ``end``."""
    first = max(start, end - _MAX_BACKSLASHES)
    at = end
    while at > first and data[at - 1] == _BACKSLASH:
        at -= 1
    if at == first > start:
        raise RestTooLarge
    return (end - at) % 2 == 1


def _short(data: mmap.mmap, start: int, end: int, texts: LongTexts) -> bytes:
    """What stands for the text from ``start`` to ``end``.

    Of one that can be no base64, as a colon tells, enough is left to see that, and what it is.
    """
    head = data[start : start + HEAD_LENGTH]
    body = payload_start(head.decode("latin-1")) or 0
    if not body and b":" in head[:32]:
        shown, _ = _split_cut_escape(data[start : start + _SHOWN_BYTES].translate(_ASCII))
        head, body = shown.rstrip(b"\\"), 0
    else:
        head = head[:body]
    digest = _digest(data, start + body, end)
    texts.spans[f"\0{digest}"] = (start + body, end)
    return head + f"\\u0000{digest}".encode()


def _digest(data: mmap.mmap, start: int, end: int) -> str:
    digest = hashlib.sha256()
    with memoryview(data) as view:
        for at in range(start, end, _CHUNK_BYTES):
            digest.update(view[at : min(at + _CHUNK_BYTES, end)])
    return digest.hexdigest()


def _unescaped(text: bytes) -> bytes:
    if b"\\" in text:
        for escape, character in _ESCAPES:
            text = text.replace(escape, character)
    return text


def _split_cut_escape(text: bytes) -> tuple[bytes, bytes]:
    """``text``, and what may be the beginning of an escape at its end."""
    at = text.rfind(b"\\", max(0, len(text) - _LONGEST_ESCAPE + 1))
    return (text, b"") if at < 0 else (text[:at], text[at:])
