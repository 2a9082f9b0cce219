"""Answers that hold the images themselves, as plain base64, in place of their URLs.

The images are read from their store and encoded piece by piece while the answer is being sent, so
that it costs little memory whatever they weigh, and the event loop is never kept for longer than
one piece takes to encode. Nothing is kept for the next poll.
"""

import secrets
from binascii import b2a_base64
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from redux_server.api.dependencies import no_task
from redux_server.api.prediction import envelope
from redux_server.api.services import Services
from redux_server.errors import Gone, Unavailable
from redux_server.storage.blobs import BlobStore
from redux_server.tasks.task import Task


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


# --- Routes ---------------------------------------------------------------------------------------


def answer(
    task: Task,
    request: Request,
    services: Services,
    headers: Mapping[str, str] | None = None,
    *,
    queue_position: int | None = None,
) -> JSONResponse:
    """A task in the shape every client reads, with ``headers`` besides."""
    data = services.present(task, str(request.base_url), queue_position=queue_position)
    return JSONResponse(envelope(data), headers=headers)


async def full_answer(
    task: Task,
    request: Request,
    services: Services,
    headers: Mapping[str, str] | None = None,
    *,
    queue_position: int | None = None,
) -> Response:
    """``answer``, with the images themselves in it if that was asked for."""
    keys = task.outcome.outputs if task.outcome else []
    if not keys or not task.input.get("enable_base64_output"):
        return answer(task, request, services, headers, queue_position=queue_position)
    body = envelope(services.present(task, str(request.base_url)))
    return await base64_answer(body, keys, services.blobs, headers)


async def _held_answer(
    task: Task, request: Request, services: Services, headers: Mapping[str, str] | None
) -> Response:
    """The answer once the task has ended; too early, it says so, and where to ask again."""
    held = await services.sync_mode.hold(task, lambda: _leaves(request))
    if held.task is None:
        raise no_task(task.id)
    if not held.too_early:
        return await full_answer(held.task, request, services, headers)
    data = held.explain(services.present(held.task, str(request.base_url)))
    return JSONResponse(envelope(data), headers=headers)


async def _leaves(request: Request) -> None:
    """Return when the client has closed its connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
