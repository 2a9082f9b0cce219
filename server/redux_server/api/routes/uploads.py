"""The paths of uploads: a ticket and the PUT that it is for, and forms with a file in them.

Bytes are handed on as they arrive; ``redux_server.pictures.uploads`` checks and stores them.
"""

import asyncio
import re
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from redux_server.api.admission import refuse_excess
from redux_server.api.dependencies import (
    DeleteRequest,
    ServicesDep,
    ids_to_delete,
    no_pictures,
    read_json,
)
from redux_server.api.openapi import DELETE_EXAMPLE, DeletedEnvelope, Success, json_body, responses
from redux_server.api.prediction import envelope, timestamp
from redux_server.api.routes.lists import MAX_PAGE, MAX_PAGE_SIZE
from redux_server.api.services import Services
from redux_server.errors import BadRequest, NotFound
from redux_server.parameters import Whole
from redux_server.pictures.upload_records import UploadRecord
from redux_server.pictures.uploads import MAX_NAME

FORM_PATHS = (
    "/api/v3/media/upload/binary",
    "/api/v2/media/upload/binary",
    "/api/v3/upload",
    "/api/v3/uploads",
)
TICKET_PATH = "/api/v3/media/uploads"
PUT_PREFIX = "/uploads/"
FORM_BYTES = 64 * 2**10  # what a form may have around its file
FIELD = "file"
MAX_PARTS = 16
_SHOWN = 40
_UPLOAD_ID = re.compile(r"[0-9a-f]{32}")
_NUMBER = re.compile(r"[0-9]{1,10}")
_HOW = f'send multipart/form-data with the file in the field "{FIELD}", such as curl -F file=@a.png'
_CONTENT_TYPE = re.compile(r"[\w.+-]{1,80}/[\w.+-]{1,80}(?:; ?[\w.+-]{1,40}=[\w.+-]{1,40})?", re.A)
_TICKET_EXAMPLE = '{"filename": "photo.jpg", "size": 123456}'
router = APIRouter(tags=["uploads"])


class TicketRequest(BaseModel):
    """The file that is to be sent."""

    model_config = ConfigDict(strict=True, extra="ignore")

    filename: str = Field("upload", max_length=1024, description="Its name", examples=["a.png"])
    size: Annotated[Whole, Field(ge=1, description="Its length in bytes", examples=[123456])]
    content_type: str | None = Field(None, description="Its type", examples=["image/png"])


class Stored(BaseModel):
    """A file that is kept."""

    type: str = Field("image", description="Always image: others are refused")
    filename: str = Field(description="As it was given")
    size: int = Field(description="In bytes")
    download_url: str = Field(
        description="The `image` of a task, or where anyone may fetch the file, for "
        "`--upload-retention-hours`"
    )


class StoredFile(Stored):
    """A file that came in a form."""

    url: str = Field(description="The same as download_url")


class StoredEnvelope(Success):
    """The answer to an upload."""

    data: StoredFile


class Instruction(BaseModel):
    """How to send the file."""

    method: str = Field(examples=["PUT"])
    url: str = Field(description="Where to; no API key is needed there")
    headers: dict[str, str] = Field(description="What to send with it")
    expires_at: str = Field(description="Until when", examples=["2026-04-01T12:34:56.000Z"])


class TicketData(Stored):
    """Where the file will be, and how it gets there."""

    upload: Instruction


class TicketEnvelope(Success):
    """The answer to the announcement of a file."""

    data: TicketData


class ListedUpload(BaseModel):
    """A file of the list."""

    id: str
    filename: str = Field(description="As it was given")
    size: int = Field(description="In bytes")
    status: str = Field(description="stored, or announced: it has not come yet")
    created_at: str
    expires_at: str = Field(description="Until when it is kept, or may be sent")
    download_url: str


class ListedUploads(BaseModel):
    """A page of files."""

    page: int
    total: int = Field(description="How many files there are")
    stored_bytes: int = Field(description="What they count: their bytes, and 16 KiB for each")
    max_stored_bytes: int = Field(description="What they may count, if the disk has room")
    items: list[ListedUpload] = Field(description="Newest first")


class ListedEnvelope(Success):
    """The answer with a page of files."""

    data: ListedUploads


def _number(name: str, most: int, description: str) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": most}
    how = {"in": "query", "required": False, "schema": schema, "description": description}
    return {"name": name, **how}


@router.post(
    TICKET_PATH,
    summary="Get a URL to send a file to",
    operation_id="create_upload",
    description="The raw bytes of the file are then sent by PUT to `upload.url`, once.",
    responses=responses(400, 401, 408, 413, 429, 503, model=TicketEnvelope, description="A ticket"),
    openapi_extra={
        "requestBody": json_body(
            TicketRequest, {"filename": "photo.png", "size": 9000, "content_type": "image/png"}
        )
    },
)
async def create_upload(request: Request, services: ServicesDep) -> JSONResponse:
    """Announce a file."""
    _check_rate(request.state.key_id, services)
    wanted = await _read_ticket_request(request)
    kind = wanted.content_type or "application/octet-stream"
    ticket = await services.uploads.issue(request.state.key_id, wanted.filename, kind, wanted.size)
    base_url = _base_url(request, services)
    upload = {
        "method": "PUT",
        "url": f"{base_url}{PUT_PREFIX}{ticket.text}",
        "headers": {"Content-Type": kind},
        "expires_at": timestamp(ticket.expires_at),
    }
    url = base_url + services.uploads.download_path(ticket.key)
    return JSONResponse(envelope(_told(wanted.filename, wanted.size, url) | {"upload": upload}))


@router.put(
    PUT_PREFIX + "{ticket}",
    summary="Send a file",
    operation_id="put_upload",
    description="To the URL that was given for it; its path is the permission.",
    responses=responses(
        400, 404, 408, 409, 410, 413, 429, 503, model=StoredEnvelope, description="It is stored"
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            },
        }
    },
)
async def put_upload(ticket: str, request: Request, services: ServicesDep) -> JSONResponse:
    """Store the file of a ticket."""
    given = services.uploads.tickets.read(ticket)
    given.check_length(request.headers.get("content-length"))
    with services.uploads.receive_for(given) as incoming:
        async for chunk in request.stream():
            await incoming.write(chunk)
        await services.uploads.redeem(given, incoming)
    name = given.key.rpartition("/")[2]
    return _stored(name, given.size_bytes, given.key, request, services)


async def upload_form(request: Request, services: ServicesDep) -> JSONResponse:
    """Store the file of a form."""
    _check_rate(request.state.key_id, services)
    content_type = request.headers.get("content-type", "")
    await services.uploads.check_stored(request.state.key_id)
    with services.uploads.receive(request.state.key_id) as incoming:
        name = await read_file(content_type, request.stream(), incoming.write)
        key = await services.uploads.keep(request.state.key_id, name, incoming)
    return _stored(name[:MAX_NAME], incoming.size_bytes, key, request, services)


@router.get(
    TICKET_PATH,
    summary="List uploads",
    operation_id="list_uploads",
    description="The files of this API key, newest first: those that are kept, and those that were "
    "announced within the hour. An extension of this server.",
    responses=responses(400, 401, 503, model=ListedEnvelope, description="A page"),
    openapi_extra={
        "parameters": [
            _number("page", MAX_PAGE, "The page to return, from 1 (the default)"),
            _number("page_size", MAX_PAGE_SIZE, "How many files a page has (20 by default)"),
        ]
    },
)
async def list_uploads(request: Request, services: ServicesDep) -> JSONResponse:
    """A page of what this key has uploaded."""
    uploads, key_id = services.uploads, request.state.key_id
    number = _asked(request, "page", 1, MAX_PAGE)
    size = _asked(request, "page_size", 20, MAX_PAGE_SIZE)
    found = await asyncio.to_thread(uploads.records.page, key_id, number=number, size=size)
    stored = await asyncio.to_thread(uploads.records.stored, key_id)
    base_url = _base_url(request, services)
    data = {
        "page": number,
        "total": stored.files,
        "stored_bytes": stored.size_bytes,
        "max_stored_bytes": uploads.max_stored_bytes,
        "items": [_listed(record, base_url, services) for record in found],
    }
    return JSONResponse(envelope(data))


@router.delete(
    TICKET_PATH + "/{upload_id}",
    summary="Delete an upload",
    operation_id="delete_upload",
    description="A task that has not read it yet then fails with code 1402. An extension.",
    responses=responses(401, 404, 503, model=DeletedEnvelope),
)
async def delete_upload(upload_id: str, request: Request, services: ServicesDep) -> JSONResponse:
    """Delete one file."""
    deleted = await _delete([upload_id], request, services)
    if not deleted:
        raise NotFound(f"No upload {upload_id[:64]!r} of this key; GET {TICKET_PATH} lists them.")
    return JSONResponse(envelope({"deleted_count": deleted}))


@router.post(
    TICKET_PATH + "/delete",
    summary="Delete uploads",
    operation_id="delete_uploads",
    description="As deleting each. Ids that are unknown, or another key's, are not counted.",
    responses=responses(400, 401, 408, 413, 503, model=DeletedEnvelope),
    openapi_extra={"requestBody": json_body(DeleteRequest, DELETE_EXAMPLE)},
)
async def delete_uploads(request: Request, services: ServicesDep) -> JSONResponse:
    """Delete some files."""
    ids = await ids_to_delete(request, "upload")
    deleted = await _delete(ids, request, services)
    return JSONResponse(envelope({"deleted_count": deleted}))


async def _delete(ids: Sequence[str], request: Request, services: Services) -> int:
    known = sorted({id_ for id_ in ids if _UPLOAD_ID.fullmatch(id_)})
    try:
        return await services.storage_threads(services.uploads.delete, request.state.key_id, known)
    except OSError:
        raise no_pictures() from None


def _listed(record: UploadRecord, base_url: str, services: Services) -> dict[str, Any]:
    url = base_url + services.uploads.download_path(record.blob, record.expires_at)
    return {
        "id": record.id,
        "filename": record.filename,
        "size": record.size_bytes,
        "status": "announced" if record.stored_at is None else "stored",
        "created_at": timestamp(record.created_at),
        "expires_at": timestamp(record.expires_at),
        "download_url": url,
    }


def _asked(request: Request, name: str, default: int, most: int) -> int:
    """The number that the query gives."""
    text = request.query_params.get(name, str(default))
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= most:
        raise BadRequest(f"{name} must be an integer from 1 to {most}; got {text[:_SHOWN]!r}.")
    return int(text)


for _path in FORM_PATHS:
    router.post(
        _path,
        summary="Send a file in a form",
        operation_id="upload" + re.sub(r"\W+", "_", _path),
        responses=responses(
            400, 401, 408, 413, 429, 503, model=StoredEnvelope, description="It is stored"
        ),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "multipart/form-data": {
                        "schema": {
                            "type": "object",
                            "properties": {"file": {"type": "string", "format": "binary"}},
                            "required": ["file"],
                        }
                    }
                },
            }
        },
    )(upload_form)


def body_limit(path: str, max_upload_bytes: int) -> int | None:
    """How long a body may be that is sent to ``path``; None for the limit of all others."""
    if path in FORM_PATHS or path.startswith(PUT_PREFIX):
        return max_upload_bytes + FORM_BYTES
    return None


def _check_rate(key_id: str, services: Services) -> None:
    refuse_excess(services.upload_rate, key_id, may=f"upload {services.settings.rate_limit} files")


async def _read_ticket_request(request: Request) -> TicketRequest:
    body = await read_json(request, _TICKET_EXAMPLE)
    try:
        wanted = TicketRequest.model_validate(body)
    except ValidationError as error:
        raise BadRequest(
            f"{_wrong_fields(error)} is missing or wrong; send an object such as "
            f'{_TICKET_EXAMPLE}, with "content_type" if it is known. size is the number of bytes, '
            "at least 1."
        ) from None
    if wanted.content_type and not _CONTENT_TYPE.fullmatch(wanted.content_type):
        raise BadRequest('content_type must be a media type such as "image/png".')
    return wanted


def _wrong_fields(error: ValidationError) -> str:
    names = {str(each["loc"][0]) if each["loc"] else "The body" for each in error.errors()}
    return " and ".join(sorted(names))


def _stored(
    name: str, size_bytes: int, key: str, request: Request, services: Services
) -> JSONResponse:
    url = _base_url(request, services) + services.uploads.download_path(key)
    return JSONResponse(envelope(_told(name, size_bytes, url) | {"url": url}))


def _told(name: str, size_bytes: int, url: str) -> dict[str, Any]:
    return {"type": "image", "filename": name, "size": size_bytes, "download_url": url}


def _base_url(request: Request, services: Services) -> str:
    return (services.settings.public_url or str(request.base_url)).rstrip("/")


# --- the form -------------------------------------------------------------------------------------


async def read_file(
    content_type: str, body: AsyncIterable[bytes], write: Callable[[bytes], Awaitable[None]]
) -> str:
    """Hand the file of the form ``body`` to ``write``, piece by piece; returns its name.

    Other fields are read and dropped; the whole is for the caller to bound.

    Raises:
        BadRequest: not a complete form with one file.
    """
    form = _Form(content_type)
    async for chunk in body:
        for piece in form.parse(chunk):
            await write(piece)
    return form.end()


class _Form:
    """What the parser has told so far. Its callbacks cannot wait, so they only take notes.

    A body may be anything: without a boundary, of endless headers or parts, cut short. What is no
    form with one file in the field ``file`` is refused as soon as that can be seen.
    """

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            shown = content_type[:_SHOWN]
            raise BadRequest(f"The Content-Type is {shown!r}, without form or boundary; {_HOW}.")
        try:
            self._parser = MultipartParser(boundary, {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_end": self._ends,
            })  # fmt: skip
        except FormParserError as error:
            raise BadRequest(f"The form cannot be read: {error}; {_HOW}.") from None
        self._pieces: list[bytes] = []
        self._header = [b"", b""]
        self._disposition = b""
        self._part_count = 0
        self._is_file = False
        self._others: list[str] = []
        self._file_name: str | None = None
        self._has_ended = False

    def parse(self, chunk: bytes) -> list[bytes]:
        """The pieces of the file that are in ``chunk``."""
        self._pieces = []
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise BadRequest(f"The form cannot be read: {error}; {_HOW}.") from None
        return self._pieces

    def end(self) -> str:
        """The name of the file, once there is no more."""
        if not self._has_ended:
            raise BadRequest("The form ends before its closing boundary; send all of it.")
        if self._file_name is None:
            found = ", ".join(self._others) or "no field"
            raise BadRequest(f'The form has {found}, and no field "{FIELD}"; {_HOW}.')
        return self._file_name

    def _part_begins(self) -> None:
        self._part_count += 1
        if self._part_count > MAX_PARTS:
            raise BadRequest(f"The form has more than {MAX_PARTS} parts; {_HOW}.")
        self._disposition = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _header_ends(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = [b"", b""]

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = name == FIELD
        if not self._is_file:
            self._others.append(repr(name[:_SHOWN]))
            return
        if self._file_name is not None:
            raise BadRequest(f'The form has several fields "{FIELD}"; send one file a request.')
        self._file_name = options.get(b"filename", b"").decode(errors="replace") or "upload"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._pieces.append(data[start:end])

    def _ends(self) -> None:
        self._has_ended = True
