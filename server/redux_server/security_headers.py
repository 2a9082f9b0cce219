"""What every answer tells browsers and caches that they must not do with it.

Source: OWASP's Secure Headers Project and REST Security Cheat Sheet.
"""

import base64
import hashlib
import re
from collections.abc import Iterable

Header = tuple[bytes, bytes]

_ALWAYS: tuple[Header, ...] = ((b"x-content-type-options", b"nosniff"),)
_NO_STORE: Header = (b"cache-control", b"no-store")
_PAGE: tuple[Header, ...] = (
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
_POLICY = (
    "default-src 'self'; script-src {scripts}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
# A stored picture that is opened as a page of its own may do nothing at all.
_FILE: tuple[Header, ...] = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; sandbox"),
    (b"referrer-policy", b"no-referrer"),
)


def security_headers(path: str, given: Iterable[Header]) -> list[Header]:
    """The headers to add to an answer of ``path`` with the headers ``given``, none of them twice.

    JSON is kept by no cache (it holds prompts and signed URLs), pages run no foreign script and
    stand in no frame, pictures are sandboxed.
    """
    present = dict(given)
    kind = present.get(b"content-type", b"")
    added = [*_ALWAYS]
    if kind.startswith(b"application/json"):
        added.append(_NO_STORE)
    elif kind.startswith(b"text/html"):
        added += (*_PAGE, (b"content-security-policy", policy().encode()))
    elif path.startswith("/files/"):
        added += _FILE
    return [header for header in added if header[0] not in present]


def policy(page: bytes = b"") -> str:
    """The Content-Security-Policy of a page: own files, and the inline scripts ``page`` has."""
    digests = [hashlib.sha256(script).digest() for script in _INLINE_SCRIPT.findall(page)]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    return _POLICY.format(scripts=" ".join(["'self'", *hashes]))
