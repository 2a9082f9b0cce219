"""Stored pictures as HTTP answers: whole, in part, or as the headers alone.

Bytes are passed on as they come from the store, so that a download costs the same little memory
whatever the size of the picture and whichever store it is in.
"""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from redux_server.api.dependencies import ServicesDep, no_pictures
from redux_server.errors import NotFound
from redux_server.pictures import inline
from redux_server.storage.blobs import BlobStore, OpenBlob

_SNIFFED_BYTES = 64
_RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")
router = APIRouter()


@router.api_route("/files/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
async def download(request: Request, path: str, services: ServicesDep) -> Response:
    """A stored picture; the signed path is the permission."""
    key = services.signer.open_key(f"/files/{path}")
    return await download_response(request, services.blobs, key)


async def download_response(request: Request, blobs: BlobStore, key: str) -> Response:
    """Answer a GET or HEAD for ``key``: ``Range`` (of one part), ``If-Range``, ``If-None-Match``.

    Raises:
        NotFound: no such blob.
        Unavailable: its store does not answer.
    """
    is_plain = request.method == "GET" and not {"range", "if-none-match"} & set(request.headers)
    blob = await _open(blobs, key, end=None if is_plain else _SNIFFED_BYTES)
    with _unavailable():
        start = await anext(blob.chunks, b"")
    headers = {
        "Cache-Control": "private, max-age=3600",
        "Accept-Ranges": "bytes",
        "Content-Length": str(blob.size_bytes),
        "Content-Type": inline.media_type(start),
    } | ({"ETag": blob.e_tag} if blob.e_tag else {})
    if is_plain:
        return StreamingResponse(_joined(start, blob.chunks), headers=headers)
    if _is_known(request, blob):
        return Response(status_code=304, headers={"ETag": blob.e_tag})
    if request.method == "HEAD":
        return Response(headers=headers)
    return await _part_response(_part(request, blob), blobs, key, headers, blob.size_bytes)


async def _part_response(
    part: tuple[int, int] | None,
    blobs: BlobStore,
    key: str,
    headers: dict[str, str],
    size_bytes: int,
) -> Response:
    first, end = part or (0, size_bytes)
    if first >= end:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size_bytes}"})
    headers["Content-Length"] = str(end - first)
    if part:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size_bytes}"
    blob = await _open(blobs, key, first=first, end=end)
    return StreamingResponse(blob.chunks, status_code=206 if part else 200, headers=headers)


async def _open(blobs: BlobStore, key: str, *, first: int = 0, end: int | None = None) -> OpenBlob:
    with _unavailable():
        try:
            return await blobs.open(key, first=first, end=end)
        except FileNotFoundError:
            raise NotFound("This file was deleted.") from None


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise no_pictures() from None


async def _joined(start: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield start
    async for piece in rest:
        yield piece


def _is_known(request: Request, blob: OpenBlob) -> bool:
    known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
    is_same = blob.e_tag in [tag.removeprefix("W/") for tag in known]
    return bool(blob.e_tag) and ("*" in known or is_same)


def _part(request: Request, blob: OpenBlob) -> tuple[int, int] | None:
    """The bytes asked for, from first to before end; None for all of them.

    A range that is malformed or has several parts is ignored, as RFC 9110, 14.2, allows.
    """
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    condition = request.headers.get("if-range")
    if match is None or match[1] == match[2] == "" or condition not in (None, blob.e_tag):
        return None
    size = blob.size_bytes
    if match[1] == "":
        return max(0, size - int(match[2])), size
    first = int(match[1])
    end = min(size, int(match[2]) + 1) if match[2] else size
    # A last byte before the first makes the range invalid, hence ignored, not unsatisfiable.
    return None if match[2] and int(match[2]) < first else (first, end)
