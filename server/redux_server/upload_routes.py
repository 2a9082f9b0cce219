"""The paths of uploads: a ticket and the PUT that it is for, and forms with a file in them."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redux_server.errors import BadRequest
from redux_server.extensions import Whole
from redux_server.openapi import Success, responses
from redux_server.refusing import refuse_excess
from redux_server.routes import Parts, read_json
from redux_server.schemas import envelope, timestamp
from redux_server.services import Services
from redux_server.upload_form import read_file

FORM_PATHS = (
    "/api/v3/media/upload/binary",
    "/api/v2/media/upload/binary",
    "/api/v3/upload",
    "/api/v3/uploads",
)
TICKET_PATH = "/api/v3/media/uploads"
PUT_PREFIX = "/uploads/"
FORM_BYTES = 64 * 2**10  # what a form may have around its file
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


@router.post(
    TICKET_PATH,
    summary="Get a URL to send a file to",
    operation_id="create_upload",
    description="The raw bytes of the file are then sent by PUT to `upload.url`, once.",
    responses=responses(400, 401, 408, 413, 429, 503, model=TicketEnvelope, description="A ticket"),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": TicketRequest.model_json_schema()}},
        }
    },
)
async def create_upload(request: Request, parts: Parts) -> JSONResponse:
    """Announce a file."""
    _check_rate(request.state.key_id, parts)
    wanted = await _read_ticket_request(request)
    kind = wanted.content_type or "application/octet-stream"
    ticket = parts.uploads.issue(request.state.key_id, wanted.filename, kind, wanted.size)
    base_url = _base_url(request, parts)
    upload = {
        "method": "PUT",
        "url": f"{base_url}{PUT_PREFIX}{ticket.text}",
        "headers": {"Content-Type": kind},
        "expires_at": timestamp(ticket.expires_at),
    }
    url = base_url + parts.uploads.download_path(ticket.key)
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
async def put_upload(ticket: str, request: Request, parts: Parts) -> JSONResponse:
    """Store the file of a ticket."""
    given = parts.uploads.tickets.read(ticket)
    given.check_length(request.headers.get("content-length"))
    with parts.uploads.receive_for(given) as incoming:
        async for chunk in request.stream():
            await incoming.write(chunk)
        await parts.uploads.redeem(given, incoming)
    name = given.key.rpartition("/")[2]
    return _stored(name, given.size_bytes, given.key, request, parts)


async def upload_form(request: Request, parts: Parts) -> JSONResponse:
    """Store the file of a form."""
    _check_rate(request.state.key_id, parts)
    content_type = request.headers.get("content-type", "")
    with parts.uploads.receive(request.state.key_id) as incoming:
        name = await read_file(content_type, request.stream(), incoming.write)
        key = await parts.uploads.keep(incoming)
    return _stored(name[:1024], incoming.size_bytes, key, request, parts)


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


def _check_rate(key_id: str, parts: Services) -> None:
    refuse_excess(parts.uploads.rate, key_id, may=f"upload {parts.settings.rate_limit} files")


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
    name: str, size_bytes: int, key: str, request: Request, parts: Services
) -> JSONResponse:
    url = _base_url(request, parts) + parts.uploads.download_path(key)
    return JSONResponse(envelope(_told(name, size_bytes, url) | {"url": url}))


def _told(name: str, size_bytes: int, url: str) -> dict[str, Any]:
    return {"type": "image", "filename": name, "size": size_bytes, "download_url": url}


def _base_url(request: Request, parts: Services) -> str:
    return (parts.settings.public_url or str(request.base_url)).rstrip("/")
