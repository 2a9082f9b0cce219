"""Pictures sent inside the request, as a data URI or as plain base64."""

import binascii
from collections.abc import Iterable, Iterator
from typing import IO
from urllib.parse import unquote_to_bytes

from redux_server.errors import BadRequest
from redux_server.parameters import IMAGE_FORMS
from redux_server.pictures.data_uri import HEAD_LENGTH, is_data_uri, payload_start
from redux_server.pictures.decode import accepted_formats, refusal_of, sniff
from redux_server.pictures.incoming import append

MAX_BYTES = 20 * 2**20
_BLANKS = b" \t\n\r\v\f"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_SNIFFED_BYTES = 1024


def payload_of(image: str, name: str) -> str:
    """The base64 in ``image``, a data URI or plain; ``name`` is that of the parameter.

    A data URI's declared type is not believed (clients label PNG as JPEG); the bytes are.

    Raises:
        BadRequest: neither of the two.
    """
    start = payload_start(image)
    if start is not None:
        return image[start:]
    if is_data_uri(image) and "," in image[:HEAD_LENGTH]:
        raise BadRequest(f"{name} is a data URI without ;base64; encode the picture as base64.")
    if ":" in image[:32]:
        raise BadRequest(f"{name} must be {IMAGE_FORMS}; got {image[:60]!r}.")
    return image


def decode(image: str, name: str = "image") -> bytes:
    """The bytes of a picture in a data URI or in plain base64, the parameter ``name``.

    Raises:
        BadRequest: not base64, too large, or not a picture of a kind we take.
    """
    return decode_payload(payload_of(image, name), name)


def decode_payload(payload: str, name: str) -> bytes:
    """The same of what ``payload_of`` gave."""
    return b"".join(decode_chunks([payload.encode(errors="replace")], name, len(payload)))


def decode_into(file: IO[bytes], chunks: Iterable[bytes], name: str, size_bytes: int) -> int:
    """Write the bytes of a picture in base64 to ``file``; how many there are.

    The base64 comes in ``chunks``, ``size_bytes`` in all. Raises as ``decode``.
    """
    written = 0
    for data in decode_chunks(chunks, name, size_bytes):
        append(file, data)
        written += len(data)
    return written


def decode_chunks(chunks: Iterable[bytes], name: str, size_bytes: int) -> Iterator[bytes]:
    """The bytes of a picture, piece by piece, as its base64 comes. Raises as ``decode``."""
    decoded, given = 0, b""
    start = b""

    def noted() -> Iterator[bytes]:
        nonlocal given
        for chunk in chunks:
            given = given or chunk[:60]
            yield chunk

    try:
        for data in _decoded(noted()):
            start += data[: max(0, _SNIFFED_BYTES - len(start))]
            decoded += len(data)
            if decoded > MAX_BYTES:
                raise BadRequest(
                    f"{name} holds about {size_bytes * 3 // 4 / 2**20:.1f} MiB; "
                    f"allowed are {MAX_BYTES >> 20} MiB."
                )
            yield data
    except binascii.Error:
        shown = given.decode(errors="replace")
        raise BadRequest(f"{name} must be {IMAGE_FORMS}; got {shown!r}.") from None
    if sniff(start) is None:
        kind = refusal_of(start)
        what = "" if kind == "no known picture" else f" that is taken, but {kind}"
        raise BadRequest(
            f"{name} must be {IMAGE_FORMS}; the {decoded} bytes sent are no picture{what}. "
            f"Pictures are taken as {', '.join(accepted_formats())}."
        )


def media_type(data: bytes) -> str:
    """The content type of stored bytes, by what they are."""
    kind = sniff(data)
    return f"image/{kind.lower()}" if kind else "application/octet-stream"


def _decoded(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Raises ``binascii.Error``. Blanks count for nothing, and padding may be missing."""
    rest, is_over = b"", False
    for chunk in _unquoted(chunks):
        plain, padding, more = chunk.translate(_URL_SAFE, _BLANKS).partition(b"=")
        if (is_over and plain) or more.strip(b"="):
            raise binascii.Error("more after the padding")
        is_over = is_over or bool(padding)
        text = rest + plain
        whole = len(text) - len(text) % 4
        rest = text[whole:]
        yield binascii.a2b_base64(text[:whole], strict_mode=True)
    yield binascii.a2b_base64(rest + b"=" * (-len(rest) % 4), strict_mode=True)


def _unquoted(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Without percent-encoding, in which base64 stands within URLs and forms."""
    cut = b""
    for chunk in chunks:
        data = cut + chunk
        at = data.rfind(b"%", max(0, len(data) - 2))
        data, cut = (data, b"") if at < 0 else (data[:at], data[at:])
        yield unquote_to_bytes(data) if b"%" in data else data
    yield cut  # an escape that does not end: no base64
