"""The page at `/`, to try the model in: plain files of ours, served as they lie in the package.

The page uses the public API with the user's key, like any other client, and loads nothing from
anywhere else. ``--playground off`` leaves it out.
"""

import gzip
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import Response

import redux_server

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_PACKAGE = Path(redux_server.__file__).parent
_FOLDER = _PACKAGE / "playground"
_SAMPLE = _PACKAGE / "static" / "sample-icon.png"
# No inline script or style, and nothing from elsewhere but the pictures that `--public-url` serves.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:{more}; "
    "connect-src 'self'{more}; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


class Asset:
    """A file of the page, whole and compressed."""

    def __init__(self, path: Path) -> None:
        self._whole = path.read_bytes()
        self._packed = gzip.compress(self._whole, 9, mtime=0)
        self._e_tag = f'"{hashlib.sha256(self._whole).hexdigest()[:20]}"'
        self._type = TYPES[path.suffix]
        self.is_page = path.suffix == ".html"

    def response(self, request: Request, *, policy: str) -> Response:
        """The file, or that the browser has it already: it asks each time, for servers are new."""
        headers = {
            "Cache-Control": "no-cache",
            "ETag": self._e_tag,
            "Vary": "Accept-Encoding",
            "X-Content-Type-Options": "nosniff",
        }
        if self.is_page:
            headers |= {
                "Content-Security-Policy": policy,
                "Cross-Origin-Opener-Policy": "same-origin",
            }
        known = request.headers.get("if-none-match", "").split(",")
        if self._e_tag in [tag.strip().removeprefix("W/") for tag in known]:
            return Response(status_code=304, headers=headers)
        is_packed = _takes_gzip(request) and len(self._packed) < len(self._whole)
        if is_packed:
            headers["Content-Encoding"] = "gzip"
        body = self._packed if is_packed else self._whole
        return Response(body, headers=headers, media_type=self._type)


def playground(public_url: str) -> APIRouter:
    """The routes of the page. ``public_url``: where pictures are, if not where the page is."""
    router = APIRouter(include_in_schema=False)
    policy = policy_of(public_url)
    for path, asset in _assets():
        router.add_api_route(path, _endpoint(asset, policy), methods=["GET", "HEAD"])
    return router


def policy_of(public_url: str) -> str:
    """The page's Content-Security-Policy."""
    where = urlsplit(public_url)
    return _POLICY.format(more=f" {where.scheme}://{where.netloc}" if where.netloc else "")


def _assets() -> Iterator[tuple[str, Asset]]:
    yield "/", Asset(_FOLDER / "index.html")
    yield "/playground/sample.png", Asset(_SAMPLE)
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in TYPES and path.suffix != ".html":
            yield f"/playground/{path.name}", Asset(path)


def _endpoint(asset: Asset, policy: str) -> Callable[[Request], Response]:
    def file_of_the_page(request: Request) -> Response:
        return asset.response(request, policy=policy)

    return file_of_the_page


def _takes_gzip(request: Request) -> bool:
    """Whether the browser names it, and not only to refuse it."""
    for part in request.headers.get("accept-encoding", "").split(","):
        name, _, weight = part.replace(" ", "").partition(";q=")
        if name in ("gzip", "*"):
            return weight.strip("0.") != "" or weight == ""
    return False
