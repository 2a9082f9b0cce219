"""What surrounds every request: its id, its log line, the limit on its body."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pytest
import structlog
from prometheus_client import REGISTRY
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from redux_server.api.middleware import RequestContext
from server.in_process import Api

LIMIT = 1000
SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"


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
