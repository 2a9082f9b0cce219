"""Headers that keep browsers and caches from misusing an answer."""

import base64
import hashlib
import re
import time
from collections.abc import Callable

import pytest

from e2e.live import a_picture
from redux_server.api.middleware import security_headers
from redux_server.api.services import Services
from server.in_process import Api

JSON_PATHS = [
    "/livez", "/health", "/readyz", "/version", "/openapi.json", "/nope", "/api/v3/nope",
    f"/api/v3/predictions/{'0' * 32}/result", "/files/nope",
]  # fmt: skip


@pytest.mark.parametrize("path", JSON_PATHS)
@pytest.mark.parametrize("key", [None, ""])
def test_json_is_kept_by_no_cache(api: Api, path: str, key: str | None) -> None:
    response = api.get(path, key=key)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_refusal_without_a_key_has_the_headers_too(api: Api) -> None:
    response = api.post("/api/v3/wavespeed-ai/flux-pro-redux", key="", json={})
    assert response.status_code == 401
    assert response.headers["cache-control"] == "no-store"


def directives(response: object) -> dict[str, list[str]]:
    policy = response.headers["content-security-policy"]  # type: ignore[attr-defined]
    return {part.split()[0]: part.split()[1:] for part in policy.split(";")}


def test_docs_run_their_own_scripts_and_no_other(api: Api) -> None:
    page = api.get("/docs", key="")
    assert page.status_code == 200
    allowed = directives(page)["script-src"]
    assert "'unsafe-inline'" not in allowed and "'unsafe-eval'" not in allowed
    inline = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    assert len(inline) == 1
    for script in inline:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in allowed
    for source in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert source.startswith("/"), "from another host"
        assert api.get(source, key="").status_code == 200


def test_docs_stand_in_no_frame_and_tell_no_referrer(api: Api) -> None:
    page = api.get("/docs", key="")
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["referrer-policy"] == "no-referrer"
    found = directives(page)
    assert found["frame-ancestors"] == found["base-uri"] == found["object-src"] == ["'none'"]
    assert found["default-src"] == ["'self'"]


def test_picture_opened_as_a_page_is_sandboxed(
    build_services: Callable[..., Services], build_api: Callable[..., Api]
) -> None:
    services = build_services()
    services.blobs.put("a/1/0.png", a_picture())
    response = build_api(services).get(services.signer.path("a/1/0.png", time.time() + 60), key="")
    assert response.headers["content-type"] == "image/png"
    assert "sandbox" in directives(response)
    assert response.headers["cache-control"] == "private, max-age=3600"


def test_no_header_is_given_twice(api: Api) -> None:
    for path in (*JSON_PATHS, "/docs", "/metrics"):
        names = [name.lower() for name, _ in api.get(path, key="").headers.multi_items()]
        assert len(set(names)) == len(names), path


def test_what_a_route_says_stands() -> None:
    given = [(b"content-type", b"application/json"), (b"cache-control", b"max-age=5")]
    assert [name for name, _ in security_headers("/x", given)] == [b"x-content-type-options"]


@pytest.mark.parametrize("path", ["/docs/", "/livez/", "/api/v3/wavespeed-ai/flux-pro-redux/"])
def test_slash_too_many_redirects_nowhere(api: Api, path: str) -> None:
    response = api.get(path, headers={"Host": "evil.example"})
    assert response.status_code in (404, 405)
    assert "evil" not in response.text and "location" not in response.headers
