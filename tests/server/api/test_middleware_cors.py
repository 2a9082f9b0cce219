"""Calls from web pages: what a browser is told, on good answers and on refusals."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from e2e.live import a_picture
from redux_server.api.services import Services
from redux_server.settings import ServerSettings, UsageError, build
from server.in_process import Api

PAGE = "https://app.example.com"
SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
POLL = f"/api/v3/predictions/{'0' * 32}/result"
ASKED = "authorization,content-type,idempotency-key,x-client-name,x-client-os,x-client-version"


def preflight(api: Api, path: str, *, origin: str = PAGE, method: str = "POST") -> Any:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": ASKED,
    }
    return api.request("OPTIONS", path, key="", headers=headers)


def names(header: str) -> set[str]:
    return {name.strip().lower() for name in header.split(",")}


@pytest.mark.parametrize(
    ("path", "method"),
    [(SUBMIT, "POST"), (POLL, "GET"), (f"/api/v3/predictions/{'0' * 32}", "DELETE"),
     ("/files/a/b.png", "GET"), (f"/api/v3/predictions/{'0' * 32}/stream", "GET"),
     ("/api/v3/media/uploads/x", "PUT")],
)  # fmt: skip
def test_preflight_needs_no_key_and_lets_the_sdk_s_headers_pass(
    api: Api, path: str, method: str
) -> None:
    answer = preflight(api, path, method=method)
    assert answer.status_code == 200, answer.text
    assert answer.headers["access-control-allow-origin"] == "*"
    assert names(answer.headers["access-control-allow-headers"]) == names(ASKED)
    assert method.lower() in names(answer.headers["access-control-allow-methods"])
    assert int(answer.headers["access-control-max-age"]) >= 600
    assert "access-control-allow-credentials" not in answer.headers


def _failing(services: Services) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a bug")

    services.find._run = fail


def test_refusals_can_be_read_by_pages_too(build_api: Callable[..., Api]) -> None:
    api = build_api(rate_limit=1)
    url = {"image": "https://example.com/a.png"}
    origin = {"Origin": PAGE}
    answers = [
        api.post(SUBMIT, json=url, headers=origin),
        api.post(SUBMIT, json=url, headers=origin),
        api.post(SUBMIT, json=url, headers=origin, key="frs_wrong"),
        api.get(POLL, headers=origin),
        api.get("/files/x", headers=origin),
        api.post("/api/v3/predictions", json={}, headers=origin),
    ]
    _failing(api.services)
    answers.append(api.get(POLL, headers=origin))
    assert [each.status_code for each in answers] == [200, 429, 401, 404, 404, 400, 500]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == "*", answer.status_code
    for answer in answers[:-1]:
        exposed = names(answer.headers["access-control-expose-headers"])
        assert {"x-request-id", "retry-after", "idempotent-replayed"} <= exposed
        assert answer.headers["x-request-id"]


def test_pictures_can_be_read_by_pages(
    build_services: Callable[..., Services], build_api: Callable[..., Api]
) -> None:
    services = build_services()
    services.blobs.put("a/1/0.png", a_picture())
    api = build_api(services)
    path = services.signer.path("a/1/0.png", time.time() + 60)
    answer = api.get(path, key="", headers={"Origin": PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
    # A browser that has the picture from an <img> must not take it for the answer to a fetch.
    assert "origin" in names(api.get(path, key="").headers["vary"])


@pytest.mark.parametrize("path", ["/metrics", "/version", "/readyz", "/docs", "/openapi.json"])
def test_what_needs_no_key_is_for_no_page_of_others(api: Api, path: str) -> None:
    answer = api.get(path, key="", headers={"Origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers
    assert preflight(api, path, method="GET").status_code == 405


def test_named_origins_only(build_api: Callable[..., Api]) -> None:
    api = build_api(cors_origins=f"{PAGE}, https://Other.example")
    for origin in (PAGE, "https://other.example"):
        assert (
            preflight(api, SUBMIT, origin=origin).headers["access-control-allow-origin"] == origin
        )
        answer = api.get(POLL, headers={"Origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
        assert "origin" in names(answer.headers["vary"])
    for origin in (
        "https://evil.example",
        "null",
        PAGE + ".evil.example",
        "http://app.example.com",
    ):
        assert "access-control-allow-origin" not in preflight(api, SUBMIT, origin=origin).headers
        answer = api.get(POLL, headers={"Origin": origin})
        assert "access-control-allow-origin" not in answer.headers
        assert answer.status_code == 404, "who is no browser is answered all the same"
    _failing(api.services)
    assert api.get(POLL, headers={"Origin": PAGE}).headers["access-control-allow-origin"] == PAGE
    crash = api.get(POLL, headers={"Origin": "https://evil.example"})
    assert crash.status_code == 500 and "access-control-allow-origin" not in crash.headers


def test_none_is_none(build_api: Callable[..., Api]) -> None:
    api = build_api(cors_origins="none")
    assert "access-control-allow-origin" not in preflight(api, SUBMIT).headers
    answer = api.get(POLL, headers={"Origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("text", ["example.com", "https://a.example/", "*,https://a.example", ";"])
def test_origins_that_no_browser_sends_are_refused_at_the_start(text: str) -> None:
    with pytest.raises(UsageError, match=r"--cors-origins must be origins .*https://app\."):
        build(ServerSettings, {"cors_origins": text}, {})
