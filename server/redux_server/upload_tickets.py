"""Upload tickets: the right to store one file, in the path of the URL that it is sent to.

A ticket is kept nowhere. What it allows stands in it, under a seal that only we can make; nothing
of a client's file name is in it, nor in the key of what it stores. Knows no store and no HTTP.
"""

import hashlib
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from redux_server.blobs import Signer
from redux_server.errors import BadRequest, Gone, NotFound

PREFIX = "upload-"
TICKET_S = 3600.0
EXTENSIONS = {
    "png": "png", "jpg": "jpg", "jpeg": "jpg", "jfif": "jpg", "webp": "webp", "gif": "gif",
    "bmp": "bmp", "avif": "avif",
}  # fmt: skip
_PURPOSE = "upload"
_TICKET = re.compile(
    r"(?P<seal>[0-9a-f]{32})\.(?P<text>(?P<expires_at>[0-9]{1,12})\.(?P<size>[0-9]{1,10})\."
    r"(?P<owner>[0-9a-f]{8})\.(?P<id>[0-9a-f]{32})\.(?P<extension>[a-z]{3,4}))"
)


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to store one file of exactly ``size_bytes`` under ``key``, once."""

    key: str
    size_bytes: int
    owner: str
    expires_at: float
    text: str

    def check_length(self, given: str | None) -> None:
        """Refuse a body that says of itself that it has another length.

        Raises:
            BadRequest: it does.
        """
        if given is not None and given.isdecimal() and int(given) != self.size_bytes:
            raise self.wrong_size(f"{int(given):,}")

    def wrong_size(self, given: str) -> BadRequest:
        """What to raise for a body of another length."""
        return BadRequest(
            f"The body has {given} bytes, but the upload was announced with {self.size_bytes:,}; "
            "send the file as it is, or ask for another upload URL."
        )


class Tickets:
    """Writes and reads tickets. ``clock`` gives Unix seconds."""

    def __init__(self, signer: Signer, *, clock: Callable[[], float] = time.time) -> None:
        self._signer = signer
        self._clock = clock

    def issue(self, key_id: str, name: str, content_type: str, size_bytes: int) -> Ticket:
        """A ticket for a file of that name, type and size."""
        extension = _extension(name, content_type)
        expires_at = int(self._clock() + TICKET_S)
        text = f"{expires_at}.{size_bytes}.{owner_of(key_id)}.{secrets.token_hex(16)}.{extension}"
        return self.read(f"{self._signer.seal(_PURPOSE, text)}.{text}")

    def read(self, text: str) -> Ticket:
        """The ticket that ``issue`` wrote as ``text``.

        Raises:
            NotFound: we did not.
            Gone: its time is over.
        """
        match = _TICKET.fullmatch(text)
        seal = self._signer.seal(_PURPOSE, match["text"]) if match else ""
        if match is None or not secrets.compare_digest(seal, match["seal"]):
            raise NotFound("No such upload; POST /api/v3/media/uploads gives a URL to send it to.")
        if int(match["expires_at"]) < self._clock():
            raise Gone("The time to send this file is over; ask for another upload URL.")
        return Ticket(
            key=key_of(match["id"], match["extension"]),
            size_bytes=int(match["size"]),
            owner=match["owner"],
            expires_at=float(match["expires_at"]),
            text=text,
        )


def key_of(id_: str, extension: str) -> str:
    """Where the upload ``id_`` is kept."""
    return f"{PREFIX}{id_}/picture.{extension}"


def owner_of(key_id: str) -> str:
    """Whom to count an upload for, in a form that may stand in a URL."""
    return hashlib.sha256(key_id.encode()).hexdigest()[:8]


def _extension(name: str, content_type: str) -> str:
    """What the URL of a picture ends in, as far as it can be told before it has come."""
    suffix = name.rpartition(".")[2].lower()
    subtype = content_type.partition(";")[0].rpartition("/")[2].strip().lower()
    return EXTENSIONS.get(suffix) or EXTENSIONS.get(subtype) or "png"
