"""URLs of this very server that come back as a task's image.

A file URL carries its proof in its path (see ``redux_server.blobs.Signer``), so the worker reads
the file from the store, whatever host the URL names, and never over the network. Here those are
refused that cannot lead anywhere, while the client still listens.
"""

from collections.abc import Iterable
from urllib.parse import urlsplit

from redux_server.blobs import Signer
from redux_server.errors import BadRequest

_PORTS = {"http": 80, "https": 443}


def check_own_url(url: str, signer: Signer, bases: Iterable[str], *, name: str = "image") -> None:
    """Refuse a URL of ours that is over, or was not made by us. Others pass.

    ``bases`` are the URLs that this server goes by; empty ones are none. ``name`` is that of the
    parameter.

    Raises:
        BadRequest: the text says what to do.
    """
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
