"""Pictures sent inside the request, as a data URI or as plain base64."""

import base64
import binascii
import re

from redux_server.errors import BadRequest
from redux_server.parameters import IMAGE_FORMS
from redux_server.pictures.decode import sniff

MAX_BYTES = 20 * 2**20
_DATA_URI = re.compile(r"data:([\w.+/-]*)((?:;[\w.=+-]+)*),", re.IGNORECASE)


def decode(image: str, name: str = "image") -> bytes:
    """The bytes of a picture in a data URI or in plain base64, the parameter ``name``.

    A data URI's declared type is not believed (clients label PNG as JPEG); the bytes are.

    Raises:
        BadRequest: not base64, too large, or not a picture of a kind we take.
    """
    match = _DATA_URI.match(image)
    if match is not None:
        if not match[2].lower().endswith(";base64"):
            raise BadRequest(f"{name} is a data URI without ;base64; encode the picture as base64.")
        image = image[match.end() :]
    elif ":" in image[:32]:
        raise BadRequest(f"{name} must be {IMAGE_FORMS}; got {image[:60]!r}.")
    if len(image) * 3 // 4 > MAX_BYTES + 3:
        raise BadRequest(
            f"{name} holds about {len(image) * 3 // 4 / 2**20:.1f} MiB; "
            f"allowed are {MAX_BYTES >> 20} MiB."
        )
    data = _decode_base64(image, name)
    if sniff(data) is None:
        raise BadRequest(
            f"{name} must be {IMAGE_FORMS}; the {len(data)} bytes sent are no picture."
        )
    return data


def media_type(data: bytes) -> str:
    """The content type of stored bytes, by what they are."""
    kind = sniff(data)
    return f"image/{kind.lower()}" if kind else "application/octet-stream"


def _decode_base64(text: str, name: str) -> bytes:
    compact = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{name} must be {IMAGE_FORMS}; got {text[:60]!r}.") from None
