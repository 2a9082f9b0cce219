"""The one file of a multipart/form-data body, handed on as it arrives. Keeps no bytes itself.

A body may be anything: without a boundary, of endless headers or parts, cut short. What is no form
with one file in the field ``file`` is refused as soon as that can be seen.
"""

from collections.abc import AsyncIterable, Awaitable, Callable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from redux_server.errors import BadRequest

FIELD = "file"
MAX_PARTS = 16
_SHOWN = 40
_HOW = f'send multipart/form-data with the file in the field "{FIELD}", such as curl -F file=@a.png'


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
    """What the parser has told so far. Its callbacks cannot wait, so they only take notes."""

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
        self._parts = 0
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
        self._parts += 1
        if self._parts > MAX_PARTS:
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
