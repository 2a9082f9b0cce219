"""A task as an HTTP answer: at once, or once it has ended; with its images' URLs, or in base64.

Images in base64 are read from their store and encoded piece by piece while the answer is being
sent, so that it costs little memory whatever they weigh, and the event loop is never kept for
longer than one piece takes to encode. Nothing is kept for the next poll.
"""

from binascii import b2a_base64
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from redux_server.api.dependencies import no_pictures, no_task
from redux_server.api.following import KeyRevoked
from redux_server.api.prediction import envelope
from redux_server.api.services import Services
from redux_server.errors import Gone, Unauthorized
from redux_server.storage.blobs import BlobStore
from redux_server.tasks.task import Task

_BETWEEN = b'","'  # one image's text and the next


def answer(
    task: Task,
    request: Request,
    services: Services,
    headers: Mapping[str, str] | None = None,
    *,
    queue_position: int | None = None,
) -> JSONResponse:
    """A task in the shape every client reads, with ``headers`` besides."""
    data = services.present(
        task,
        str(request.base_url),
        queue_position=queue_position,
        waiting_for=services.fleet.last.waiting_for(task),
    )
    return JSONResponse(envelope(data), headers=headers)


async def full_answer(
    task: Task,
    request: Request,
    services: Services,
    headers: Mapping[str, str] | None = None,
    *,
    queue_position: int | None = None,
) -> Response:
    """``answer``, with the images themselves in it if that was asked for.

    Raises:
        Gone, Unavailable: as ``base64_answer`` does.
    """
    keys = task.outcome.outputs if task.outcome else []
    if not keys or not task.input.get("enable_base64_output"):
        return answer(task, request, services, headers, queue_position=queue_position)
    data = services.present(task, str(request.base_url))
    return await base64_answer(data, keys, services.blobs, headers)


async def held_answer(
    task: Task,
    request: Request,
    services: Services,
    headers: Mapping[str, str] | None,
    *,
    digest: str,
) -> Response:
    """The answer once the task has ended; too early, it says so, and where to ask again.

    A caller who leaves meanwhile is noted, with the ``digest`` of the request.

    Raises:
        NotFound: the task was deleted meanwhile.
        Unauthorized: the API key was revoked meanwhile.
        Gone, Unavailable: as ``base64_answer`` does.
    """
    async with services.rejoining.waiting(task, digest) as waiting:

        async def leaves() -> None:
            await _leaves(request)
            waiting.leave()

        try:
            found = await services.sync_mode.hold(task, leaves)
        except KeyRevoked:
            raise Unauthorized(
                "The API key was revoked while the request was held. The task goes on.",
                headers={"WWW-Authenticate": "Bearer"},
            ) from None
    if found.task is None:
        raise no_task(task.id)
    if not found.too_early:
        return await full_answer(found.task, request, services, headers)
    data = found.explain(services.present(found.task, str(request.base_url)))
    return JSONResponse(envelope(data), headers=headers)


async def _leaves(request: Request) -> None:
    """Return when the client has closed its connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def base64_answer(
    data: Mapping[str, Any],
    keys: Sequence[str],
    blobs: BlobStore,
    headers: Mapping[str, str] | None,
) -> Response:
    """The prediction object ``data``, its outputs the blobs of ``keys`` (one or more) in base64.

    Raises:
        Gone: one of them was deleted.
        Unavailable: their store does not answer.
    """
    sizes = [await _size_of(key, blobs) for key in keys]
    fields = list(data.items())  # the outputs stand between others, as in every other answer
    place = list(data).index("outputs")
    start = _json(envelope(dict(fields[:place]))).removesuffix(b"}}") + b',"outputs":["'
    end = b'"],' + _json(dict(fields[place + 1 :])).removeprefix(b"{") + b"}"
    in_base64 = sum((size + 2) // 3 * 4 for size in sizes)
    length = len(start) + in_base64 + len(_BETWEEN) * (len(keys) - 1) + len(end)
    return StreamingResponse(
        _pieces(start, keys, end, blobs),
        media_type="application/json",
        headers={**(headers or {}), "Content-Length": str(length)},
    )


async def _size_of(key: str, blobs: BlobStore) -> int:
    try:
        return (await blobs.open(key, end=1)).size_bytes
    except FileNotFoundError:
        raise Gone("The images of this task are no longer kept; run it again.") from None
    except OSError:
        raise no_pictures() from None


def _json(content: Mapping[str, Any]) -> bytes:
    return bytes(JSONResponse(content).body)


async def _pieces(
    start: bytes, keys: Sequence[str], end: bytes, blobs: BlobStore
) -> AsyncIterator[bytes]:
    before = start
    for key in keys:
        yield before
        async for piece in _encoded((await blobs.open(key)).chunks):
            yield piece
        before = _BETWEEN
    yield end


async def _encoded(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in chunks:
        rest += chunk
        whole = len(rest) // 3 * 3
        yield b2a_base64(rest[:whole], newline=False)
        rest = rest[whole:]
    yield b2a_base64(rest, newline=False)
