"""Which web pages may call the API from a browser.

A page needs an API key like anyone else: keys are bearer tokens that no browser adds by itself, and
cookies there are none. So a page's origin alone opens nothing, and any may call unless the operator
names some. What needs no key (``/metrics``, ``/version``) is for no page of others.
"""

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

ANY, NONE = "*", "none"
EXPOSED = ("X-Request-Id", "Retry-After", "Idempotent-Replayed", "Content-Range", "ETag")
PREFLIGHT_KEPT_S = 7200  # as long as any browser keeps it
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
_OPEN = ("/api/", "/files/")


def origins_of(setting: str) -> tuple[str, ...]:
    """The origins that ``--cors-origins`` names, written as browsers send them."""
    names = tuple(part.strip().lower() for part in setting.split(","))
    return () if names == (NONE,) else names


def headers_of_a_crash(path: str, origin: str | None, setting: str) -> dict[str, str]:
    """What lets a page read an answer that was made outside of ``Cors``, as that to a crash is."""
    origins = origins_of(setting)
    if origin is None or not path.startswith(_OPEN):
        return {}
    if ANY in origins:
        return {"Access-Control-Allow-Origin": ANY}
    return {"Access-Control-Allow-Origin": origin} if origin in origins else {}


class Cors:
    """Answers preflights, and tells browsers which pages may read what comes back."""

    def __init__(self, app: ASGIApp, *, origins: str) -> None:
        self._app = app
        self._opened = CORSMiddleware(
            app,
            allow_origins=origins_of(origins),
            allow_methods=_METHODS,
            allow_headers=["*"],  # those asked for: x-client-* are many, and none can do harm
            expose_headers=EXPOSED,
            max_age=PREFLIGHT_KEPT_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        is_open = scope["type"] == "http" and scope["path"].startswith(_OPEN)
        await (self._opened if is_open else self._app)(scope, receive, send)
