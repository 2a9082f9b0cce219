"""Answers that hold the images themselves, as plain base64, in place of their URLs.

The images are read from their store and encoded piece by piece while the answer is being sent, so
that it costs little memory whatever they weigh, and the event loop is never kept for longer than
one piece takes to encode. Nothing is kept for the next poll.
"""

import secrets
from binascii import b2a_base64
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from redux_server.blobs import BlobStore
from redux_server.errors import Gone, Unavailable


async def base64_answer(
    body: dict[str, Any], keys: Sequence[str], blobs: BlobStore, headers: Mapping[str, str] | None
) -> Response:
    """The answer ``body``, with the blobs of ``keys`` as its prediction's outputs.

    Raises:
        Gone: one of them was deleted.
        Unavailable: their store does not answer.
    """
    sizes = [await _size_of(key, blobs) for key in keys]
    mark = secrets.token_hex(16)
    body = {**body, "data": {**body["data"], "outputs": [mark] * len(keys)}}
    parts = bytes(JSONResponse(body).body).split(mark.encode())
    length = sum(map(len, parts)) + sum((size + 2) // 3 * 4 for size in sizes)
    return StreamingResponse(
        _pieces(parts, keys, blobs),
        media_type="application/json",
        headers={**(headers or {}), "Content-Length": str(length)},
    )


async def _size_of(key: str, blobs: BlobStore) -> int:
    try:
        return (await blobs.open(key, end=1)).size_bytes
    except FileNotFoundError:
        raise Gone("The images of this task are no longer kept; run it again.") from None
    except OSError:
        raise Unavailable(
            "The store of pictures does not answer; try again.", headers={"Retry-After": "5"}
        ) from None


async def _pieces(
    parts: Sequence[bytes], keys: Sequence[str], blobs: BlobStore
) -> AsyncIterator[bytes]:
    yield parts[0]
    for part, key in zip(parts[1:], keys, strict=True):
        async for piece in _encoded((await blobs.open(key)).chunks):
            yield piece
        yield part


async def _encoded(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in chunks:
        rest += chunk
        whole = len(rest) // 3 * 3
        yield b2a_base64(rest[:whole], newline=False)
        rest = rest[whole:]
    yield b2a_base64(rest, newline=False)
