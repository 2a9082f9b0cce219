"""The pictures of a submit: URLs are noted as they are, inline ones stored before the task is.

All are looked at before any is stored; a request with one that is no picture stores nothing. URLs
of this very server are looked at too, while the client still listens. Knows no task, and no HTTP
beyond the errors that it raises.
"""

import asyncio
import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import structlog

from redux_server import metrics
from redux_server.errors import BadRequest, Unavailable
from redux_server.parameters import ALLOWED, MAX_URL, PredictionRequest
from redux_server.pictures import inline
from redux_server.pictures.incoming import mapped, nameless_file, refused_by_store
from redux_server.pictures.long_texts import LONG_BYTES, LongTexts
from redux_server.storage.blobs import BlobStore
from redux_server.storage.signing import Signer
from redux_server.storage.threads import StorageThreads
from redux_server.tasks.stored import FILE_BYTES

_PICTURES = ("image", "images", "mask")
_PORTS = {"http": 80, "https": 443}
_log = structlog.get_logger("redux_server.pictures.submitted")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_Bytes = bytes | memoryview


class _Given(NamedTuple):
    """A picture of a request: what an error calls it, what was sent, its name if it is stored."""

    name: str
    sent: str
    stored_as: str


def check_long_texts(body: Any, texts: LongTexts) -> None:
    """Refuse a long text that is no picture. In what is no parameter nobody looks.

    Raises:
        BadRequest: the text says which parameter.
    """
    for name, value in body.items() if isinstance(body, dict) else ():
        is_long = isinstance(value, str) and texts.is_in(value)
        if is_long and name in ALLOWED and name not in _PICTURES:
            raise BadRequest(
                f"{name} must be {ALLOWED[name]}; got a text of more than {LONG_BYTES >> 10} KiB."
            )


def has_inline_pictures(wanted: PredictionRequest) -> bool:
    """Whether ``store_pictures`` would have something to store, or to complain of."""
    return not all(_is_url(sent) for _, sent in sent_pictures(wanted))


class StoredPictures(NamedTuple):
    """What to note as a task's pictures, and what those that were stored count."""

    noted: dict[str, Any]
    counted_bytes: int


def least_picture_bytes(wanted: PredictionRequest, texts: LongTexts) -> int:
    """What the inline pictures of a request will count at least; exact once they are decoded.

    Raises:
        BadRequest: one is neither a URL nor a picture.
    """
    counted = 0
    for each in _given(wanted):
        if not _is_url(each.sent):
            payload = inline.payload_of(each.sent, each.name)
            length = texts.size_bytes(payload) if payload in texts else len(payload)
            counted += length * 7 // 10 + FILE_BYTES  # base64 has blanks and line ends, too
    return counted


async def store_pictures(
    wanted: PredictionRequest,
    task_id: str,
    blobs: BlobStore,
    *,
    threads: StorageThreads,
    long_texts: LongTexts,
    folder: Path,
) -> StoredPictures:
    """Put inline pictures into the store; of others, their URLs are noted.

    ``long_texts`` are those of the request; what they are decoded to lies in ``folder`` meanwhile.

    Raises:
        BadRequest: one is neither a URL nor a picture.
        Unavailable: they cannot be stored; none is.
    """
    given = list(_given(wanted))
    decoded: dict[str, _Bytes] = {}
    with contextlib.ExitStack() as files:
        for each in given:
            if _is_url(each.sent):
                _check_url(each)
            else:
                decoded[each.stored_as] = await asyncio.to_thread(
                    _decode, each, long_texts, folder, files
                )
        await _store(decoded, task_id, blobs, threads)
        counted_bytes = sum(len(data) + FILE_BYTES for data in decoded.values())
    noted = [
        f"blob:{task_id}/{each.stored_as}" if each.stored_as in decoded else each.sent
        for each in given
    ]
    pictures: dict[str, Any] = {"image": noted[0]}
    if wanted.images:
        pictures["images"] = noted[1 : 1 + len(wanted.images)]
    if wanted.mask is not None:
        pictures["mask"] = noted[-1]
    return StoredPictures(pictures, counted_bytes)


async def forget_pictures(
    given: dict[str, Any], task_id: str, blobs: BlobStore, threads: StorageThreads
) -> None:
    """Delete what ``store_pictures`` put; URLs put nothing, and their refusal must stay cheap."""
    noted = [given["image"], *given.get("images", ()), given.get("mask", "")]
    if any(each.startswith("blob:") for each in noted):
        await _delete(task_id, blobs, threads)


def sent_pictures(wanted: PredictionRequest) -> Iterator[tuple[str, str]]:
    """What an error calls each picture of a request, and what was sent for it."""
    for given in _given(wanted):
        yield given.name, given.sent


def _given(wanted: PredictionRequest) -> Iterator[_Given]:
    yield _Given("image", wanted.image, "input")
    for index, sent in enumerate(wanted.images):
        yield _Given(f"images[{index}]", sent, f"input-{index + 1}")
    if wanted.mask is not None:
        yield _Given("mask", wanted.mask, "mask")


def _decode(given: _Given, texts: LongTexts, folder: Path, files: contextlib.ExitStack) -> _Bytes:
    payload = inline.payload_of(given.sent, given.name)
    if payload not in texts:
        return inline.decode_payload(payload, given.name)
    file = files.enter_context(nameless_file(folder))
    with refused_by_store():
        size_bytes = inline.decode_into(
            file, texts.chunks(payload), given.name, texts.size_bytes(payload)
        )
    return files.enter_context(mapped(file, size_bytes))


async def _store(
    decoded: dict[str, _Bytes], task_id: str, blobs: BlobStore, threads: StorageThreads
) -> None:
    for name, data in decoded.items():
        try:
            await threads(blobs.put, f"{task_id}/{name}", data)
        except OSError as error:
            metrics.REJECTED.labels("blobs").inc()
            _log.warning("an input picture could not be stored", reason=str(error))
            if len(decoded) > 1:
                await _delete(task_id, blobs, threads)
            raise Unavailable(
                "The picture could not be stored (disk full, or its store away); nothing was "
                "started.",
                headers={"Retry-After": "5"},
            ) from None


async def _delete(task_id: str, blobs: BlobStore, threads: StorageThreads) -> None:
    with contextlib.suppress(OSError):  # the sweep of strays will find it
        await threads(blobs.delete_under, task_id)


def _is_url(sent: str) -> bool:
    return re.match(r"https?:", sent, re.IGNORECASE) is not None


def _check_url(given: _Given) -> None:
    if not _is_usable(given.sent):
        raise BadRequest(f"{given.name} must be a complete http(s) URL; got {given.sent[:80]!r}.")


def _is_usable(url: str) -> bool:
    if len(url) > MAX_URL or _CONTROL.search(url):
        return False
    try:
        parts = urlsplit(url)
        is_host = bool(parts.hostname) and not any(each.isspace() for each in parts.netloc)
        return is_host and (parts.port or 1) > 0
    except ValueError:
        return False


# --- URLs of this server --------------------------------------------------------------------------


def check_own_url(url: str, signer: Signer, bases: Iterable[str], *, name: str = "image") -> None:
    """Refuse a URL of ours that is over, or was not made by us. Others pass.

    A file URL carries its proof in its path (see ``redux_server.storage.signing.Signer``), so the
    worker reads the file from the store, whatever host the URL names, and never over the network.
    ``bases`` are the URLs that this server goes by; empty ones are none. ``name`` is that of the
    parameter.

    Raises:
        BadRequest: the text says what to do.
    """
    if len(url) > MAX_URL:
        return  # no URL
    if signer.key_of(url) is not None:
        if signer.is_over(url):
            raise BadRequest(
                f"{name} is a file URL of this server whose time is over; upload the picture "
                "again, or run the task that made it again."
            )
        return
    own = {_origin(base) for base in bases if base}
    try:
        origin, path = _origin(url), urlsplit(url).path
    except ValueError:
        return  # what is wrong with it is said elsewhere
    if origin not in own:
        return
    if "/uploads/" in path:
        raise BadRequest(
            f"{name} is the URL that a file is sent to by PUT; give the download_url that came "
            "with it instead."
        )
    if "/files/" in path:
        raise BadRequest(
            f"{name} is no file URL that this server has made: its signature does not match. "
            "Give it exactly as it was in outputs or download_url."
        )


def _origin(url: str) -> tuple[str, int | None]:
    parts = urlsplit(url)
    return (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme.lower())
