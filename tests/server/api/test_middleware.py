"""What surrounds every request: its id, its log line, its body's bounds, headers for browsers."""

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pytest
import structlog
from prometheus_client import REGISTRY
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from e2e.live import a_picture
from redux_server.api.middleware import BodyLimit, RequestContext, security_headers
from redux_server.api.services import Services
from redux_server.errors import TooSlow
from redux_server.settings import ServerSettings, UsageError, build
from server.in_process import SUBMIT, Api

LIMIT = 1000


async def _read_all(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


def call(
    app: Any,
    headers: Iterable[tuple[bytes, bytes]] = (),
    **more: Any,
) -> list[Message]:
    """What ``app`` sends for a request without a body."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": list(headers), **more}
    asyncio.run(app(scope, receive, send))
    return sent


def headers_of(sent: list[Message]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in sent[0]["headers"]}


# --- the limit on bodies --------------------------------------------------------------------------


@pytest.fixture
def small_api(build_api: Callable[..., Api], monkeypatch: pytest.MonkeyPatch) -> Api:
    """An API that takes bodies of at most ``LIMIT`` bytes."""
    monkeypatch.setattr("redux_server.api.app.BODY_LIMIT", LIMIT)
    return build_api()


async def in_chunks(body: bytes, taken: list[int], size: int = 100) -> AsyncIterator[bytes]:
    """``body`` as a client sends it that does not say how long it is."""
    for at in range(0, len(body), size):
        taken.append(size)
        yield body[at : at + size]


def body_of(length: int) -> bytes:
    """A valid request of exactly ``length`` bytes."""
    start = b'{"image": "https://example.com/a.png"'
    return start + b" " * (length - len(start) - 1) + b"}"


def test_body_of_exactly_the_limit_passes(small_api: Api) -> None:
    assert small_api.post(SUBMIT, content=body_of(LIMIT)).status_code == 200
    assert small_api.post(SUBMIT, content=in_chunks(body_of(LIMIT), [])).status_code == 200


def test_declared_length_over_the_limit_is_refused(small_api: Api) -> None:
    check_too_large(small_api.post(SUBMIT, content=body_of(LIMIT + 1)))


def test_chunked_body_over_the_limit_is_refused_before_it_has_all_come(small_api: Api) -> None:
    taken: list[int] = []
    response = small_api.post(SUBMIT, content=in_chunks(body_of(100 * LIMIT), taken))
    assert "content-length" not in response.request.headers
    check_too_large(response)
    assert sum(taken) <= 2 * LIMIT


def test_body_is_counted_whatever_was_declared(small_api: Api) -> None:
    headers = {"Content-Length": "5"}
    response = small_api.post(SUBMIT, content=in_chunks(body_of(LIMIT + 1), []), headers=headers)
    check_too_large(response)


def check_too_large(response: Any) -> None:
    assert response.status_code == 413
    body = response.json()
    assert (body["code"], body["data"]) == (413, None)
    assert "larger than" in body["message"]
    assert response.headers["x-request-id"]


def test_limit_is_what_a_picture_of_20_mib_needs_as_base64() -> None:
    from redux_server.api.app import BODY_LIMIT
    from redux_server.pictures.inline import MAX_BYTES

    assert MAX_BYTES == 20 * 2**20
    assert BODY_LIMIT > MAX_BYTES * 4 / 3 + 10_000
    assert BODY_LIMIT < 30_000_000


def read_through(pauses_s: list[float], size: int, *, patience_s: float) -> int:
    """The bytes of a body of which ``size`` come after each pause; raises what the limit raises."""
    left = list(pauses_s)
    read: list[int] = []

    async def receive() -> Message:
        await asyncio.sleep(left.pop())
        return {"type": "http.request", "body": bytes(size), "more_body": bool(left)}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        read.append(len(await Request(scope, receive).body()))

    async def send(message: Message) -> None:
        raise AssertionError("nothing to send")

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(BodyLimit(app, limit=2**30, patience_s=patience_s)(scope, receive, send))
    return read[0]


def test_each_byte_that_came_buys_time() -> None:
    # 8 steps of 0.1 s are more than 0.4 s of patience, but 2^15 bytes a step are a second each.
    assert read_through([0.1] * 8, 2**15, patience_s=0.4) == 8 * 2**15
    with pytest.raises(TooSlow, match=r"allowed are 0\.4 s"):
        read_through([0.1] * 8, 1, patience_s=0.4)


def test_connection_is_waited_on_without_limit_once_the_body_is_there() -> None:
    waited = []

    async def receive() -> Message:
        if not waited:
            waited.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.sleep(0.5)
        return {"type": "http.disconnect"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"

    async def send(message: Message) -> None:
        raise AssertionError("nothing to send")

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(BodyLimit(app, limit=10, patience_s=0.1)(scope, receive, send))


# --- request ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["abc", "0:1.2-3_4", "x" * 128])
def test_request_id_of_the_client_is_kept(given: str) -> None:
    sent = call(RequestContext(_read_all), headers=[(b"x-request-id", given.encode())])
    assert headers_of(sent)["x-request-id"] == given


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 129, b'{"a": 1}', b"a\r\nb: c", b"<script>"])
def test_unusable_request_id_is_replaced(given: bytes) -> None:
    sent = call(RequestContext(_read_all), headers=[(b"x-request-id", given)])
    made = headers_of(sent)["x-request-id"]
    assert made.isalnum() and len(made) == 16


def test_each_request_without_an_id_gets_one_of_its_own() -> None:
    app = RequestContext(_read_all)
    assert len({headers_of(call(app))["x-request-id"] for _ in range(10)}) == 10


@pytest.mark.parametrize("path", ["/livez", "/nope", "/api/v3/predictions/x/result", "/files/x"])
def test_every_answer_carries_the_request_id(api: Api, path: str) -> None:
    response = api.get(path, headers={"X-Request-ID": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_refusal_for_want_of_a_key_carries_the_request_id(api: Api) -> None:
    response = api.get("/api/v3/x", key="", headers={"X-Request-ID": "mine-2"})
    assert (response.status_code, response.headers["x-request-id"]) == (401, "mine-2")


def test_request_id_is_stored_with_the_task(api: Api) -> None:
    body = {"image": "https://example.com/a.png"}
    task = api.post(SUBMIT, json=body, headers={"X-Request-ID": "mine-3"}).json()["data"]
    (stored,) = api.services.store.get([task["id"]])
    assert stored is not None
    assert stored.request_id == "mine-3"


# --- logs and measures ----------------------------------------------------------------------------


def test_log_line_says_what_happened_but_not_the_query_or_the_signature() -> None:
    with structlog.testing.capture_logs() as lines:
        call(RequestContext(_read_all), path="/x", query_string=b"webhook=secret")
        call(RequestContext(_read_all), path="/files/secret/1/a.png")
    assert [line["path"] for line in lines] == ["/x", "/files/..."]
    assert all(line["status"] == 200 and line["method"] == "POST" for line in lines)
    assert "secret" not in str(lines)


def test_request_that_raises_is_logged_as_500() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    with structlog.testing.capture_logs() as lines, pytest.raises(ValueError):
        call(RequestContext(broken))
    assert [line["status"] for line in lines] == [500]


def test_id_is_bound_to_log_lines_during_the_request_only() -> None:
    seen = []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(structlog.contextvars.get_contextvars().get("request_id"))
        await PlainTextResponse("")(scope, receive, send)

    async def twice() -> None:
        for _ in range(2):
            await RequestContext(look)(
                {"type": "http", "method": "GET", "path": "/", "headers": []}, None, _ignore
            )
            seen.append(structlog.contextvars.get_contextvars().get("request_id"))

    asyncio.run(twice())
    assert seen[0] and seen[2] and seen[0] != seen[2]
    assert seen[1] is None and seen[3] is None


def test_requests_are_measured_by_route_not_by_path(api: Api) -> None:
    route = "result"
    labels = {"method": "GET", "route": route, "status": "404"}
    name = "flux_redux_http_request_duration_seconds_count"
    before = REGISTRY.get_sample_value(name, labels) or 0
    for number in range(3):
        api.get(f"/api/v3/predictions/{number}/result")
    assert REGISTRY.get_sample_value(name, labels) == before + 3


def test_other_kinds_of_traffic_pass_untouched() -> None:
    seen = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    asyncio.run(RequestContext(inner)({"type": "lifespan"}, _never, _ignore))
    assert seen == ["lifespan"]


async def _never() -> Message:
    raise AssertionError("nothing to receive")


async def _ignore(message: Message) -> None:
    pass


# --- pages that call ------------------------------------------------------------------------------


PAGE = "https://app.example.com"
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


# --- headers for browsers and caches --------------------------------------------------------------


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
