"""Requests made from our OpenAPI document, right and wrong: what comes back is as it says.

And every route of the app, listed by the app itself: what is not public asks for a key.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from sqlalchemy import Engine
from starlette.routing import BaseRoute, Mount, Route

import redux_server
from e2e.live import a_picture
from redux_server.api.services import Services
from redux_server.dispatch.presence import Presence, WorkerState
from redux_server.parameters import MODELS
from redux_server.tasks.task import Outcome, Status
from redux_server.webhooks.sender import WebhookSender
from server.in_process import Api, end_next

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
BASE_URL = "http://test"
PICTURE = a_picture()
ENDS = {
    "completed": Outcome(Status.COMPLETED, ["output/1/0.png"], [False], [7], {"inference": 12}),
    "failed": Outcome(Status.FAILED, error="It went wrong.", code=5000),
}
STATES = ("created", "processing", "cancelled", "deleted", *ENDS)
PLAYGROUND = Path(redux_server.__file__).parent / "playground"
PUBLIC = {
    "/livez", "/health", "/readyz", "/version", "/metrics", "/docs", "/openapi.json",
    "/files/{path:path}", "/uploads/{ticket}",  # their paths are signed
    "/static-offline-docs",
    "/", "/playground/sample.png",
    *(f"/center/default/api/v1/model_product/{name}"
      for name in ("type_statistics", "search", "detail/{name:path}")),
    *(f"/playground/{path.name}" for path in PLAYGROUND.iterdir() if path.suffix != ".html"),
}  # fmt: skip


@pytest.fixture
def fuzzed(
    build_services: Callable[..., Services],
    build_api: Callable[..., Api],
    database: Engine,
) -> Api:
    """An API with a worker that says it is ready, and room for everything. It calls no webhook."""
    services = build_services(max_queue=10**9)
    presence = Presence(database, silent_s=1e9)
    presence.announce("w", "cpu", WorkerState.READY, "as if")
    sender = WebhookSender(services.webhooks.outbox, lambda _: None)
    webhooks = replace(services.webhooks, sender=sender)
    return build_api(replace(services, presence=presence, webhooks=webhooks))


def operations(app: FastAPI) -> list[Any]:
    schema = schemathesis.openapi.from_dict(app.openapi())
    return [found.ok() for found in schema.get_all_operations()]


def strategies(operation: Any) -> st.SearchStrategy[Any]:
    """Requests as the document has them, and others."""
    modes = schemathesis.GenerationMode
    right = operation.as_strategy(generation_mode=modes.POSITIVE)
    if operation.body:
        wrong = operation.as_strategy(generation_mode=modes.NEGATIVE)
        return st.one_of(right.map(with_picture), right, wrong)
    if list(operation.path_parameters):
        return st.one_of(right, operation.as_strategy(generation_mode=modes.NEGATIVE))
    return right


def with_picture(case: Any) -> Any:
    """The case with an image that is one: a text made up at random hardly ever is."""
    if case.media_type == "application/json":
        case.body["image"] = "https://example.com/a.png"
    elif case.media_type == "multipart/form-data":
        case.body["file"] = PICTURE
    return case


def a_task(api: Api, state: str) -> str:
    """The id of a new task in this state."""
    sent = api.post(f"/api/v3/{MODELS[0]}", json={"image": "https://example.com/a.png"})
    task_id: str = sent.json()["data"]["id"]
    if state == "cancelled":
        api.post(f"/api/v3/predictions/{task_id}/cancel")
    elif state == "deleted":
        api.request("DELETE", f"/api/v3/predictions/{task_id}")
    elif state in ENDS:
        while (ended := end_next(api.services.store, ENDS[state])) and ended.id != task_id:
            pass  # those of earlier cases are before it
    elif state == "processing":
        while task_id not in [task.id for task in api.services.store.claim("host/cpu")]:
            pass
    return task_id


def a_ticket(api: Api, size: int) -> str:
    """What permits an upload of so many bytes."""
    sent = api.post("/api/v3/media/uploads", json={"filename": "a.png", "size": size})
    url: str = sent.json()["data"]["upload"]["url"]
    return url.rpartition("/")[2]


def with_what_there_is(api: Api, case: Any, state: str) -> None:
    """Name a task (in ``state``), a ticket or a model that there is: made-up ids never do."""
    if "task_id" in (case.path_parameters or {}):
        if case.path.endswith("/stream") and state in ("created", "processing"):
            state = "completed"  # a stream of others goes on
        case.path_parameters["task_id"] = a_task(api, state)
    elif "ticket" in (case.path_parameters or {}):
        if state in ENDS:
            case.body = PICTURE  # what was announced; others send too much or too little
        case.path_parameters["ticket"] = a_ticket(api, len(PICTURE))
    elif isinstance(case.body, dict):
        if "model_id" in case.body:
            case.body["model_id"] = MODELS[0]
        if isinstance(case.body.get("ids"), list):
            case.body["ids"] = [*case.body["ids"][:50], a_task(api, state)]


def send(api: Api, case: Any) -> Any:
    given = case.as_transport_kwargs(base_url=BASE_URL)
    given["headers"] = {**(given.get("headers") or {}), "Authorization": f"Bearer {api.key}"}
    names = ("method", "url", "headers", "params", "cookies", "data", "json", "files")
    wire = requests.Request(**{name: given[name] for name in names if name in given}).prepare()
    return api.request(
        str(wire.method),
        str(wire.url),
        key="",
        headers=dict(wire.headers),
        content=wire.body or b"",
    )


def fuzz(api: Api, cases: int) -> Counter[tuple[str, int]]:
    """Try ``cases`` requests, shared out among the operations.

    Counts the answers by operation and status.
    """
    statuses: Counter[tuple[str, int]] = Counter()
    todo = operations(api.app)
    with_input = [each for each in todo if each.body or list(each.path_parameters)]
    plain = [each for each in todo if each not in with_input]
    share = (cases - len(plain)) // len(with_input) + 1

    def run(operation: Any, count: int) -> None:
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategies(operation), state=st.sampled_from([*STATES, ""]))
        def check(case: Any, state: str) -> None:
            if state:
                with_what_there_is(api, case, state)
            response = send(api, case)
            statuses[operation.label, response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        check()

    for operation in with_input:
        run(operation, share)
    for operation in plain:
        run(operation, 1)
    return statuses


def by_status(answers: Counter[tuple[str, int]]) -> Counter[int]:
    statuses: Counter[int] = Counter()
    for (_, status), count in answers.items():
        statuses[status] += count
    return statuses


def check_statuses(statuses: Counter[int], cases: int) -> None:
    assert sum(statuses.values()) >= cases, statuses
    assert set(statuses) <= {200, 204, 400, 404, 409, 410, 413}, statuses
    assert min(statuses[200], statuses[400], statuses[404]) >= cases // 100, statuses


def test_answers_are_as_the_document_says(fuzzed: Api) -> None:
    check_statuses(by_status(fuzz(fuzzed, 300)), 300)


@pytest.mark.slow
def test_many_answers_are_as_the_document_says(fuzzed: Api) -> None:
    answers = fuzz(fuzzed, 2500)
    statuses = by_status(answers)
    labels = {each.label for each in operations(fuzzed.app)}
    print(f"{sum(statuses.values())} requests, {len(labels)} operations: {dict(statuses)}")
    check_statuses(statuses, 2500)
    assert {label for label, status in answers if status == 200} == labels, "none well answered"


def test_a_deviation_would_be_seen(fuzzed: Api) -> None:
    """The document promises another type for a field: the fuzzer must object."""
    document = fuzzed.app.openapi()
    document["components"]["schemas"]["Prediction"]["properties"]["status"] = {"type": "integer"}
    document["components"]["schemas"]["ErrorBody"]["properties"]["code"] = {"type": "string"}
    with pytest.raises((Failure, BaseExceptionGroup)) as caught:
        fuzz(fuzzed, 60)
    assert "Response violates schema" in "".join(traceback.format_exception(caught.value))


def follow(api: Api, state: str) -> None:
    """Hold a stream of a task in ``state`` against the document."""
    (operation,) = [each for each in operations(api.app) if each.path.endswith("/stream")]
    case = operation.Case(path_parameters={"task_id": a_task(api, state)})
    response = send(api, case)
    assert response.status_code == 200
    case.validate_response(response, checks=CHECKS)


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled"])
def test_events_are_as_the_document_says(fuzzed: Api, state: str) -> None:
    follow(fuzzed, state)


def test_a_deviation_in_an_event_would_be_seen(fuzzed: Api) -> None:
    document = fuzzed.app.openapi()
    document["components"]["schemas"]["Prediction"]["properties"]["status"] = {"type": "integer"}
    with pytest.raises(
        (Failure, BaseExceptionGroup), match="SSE event payload violates content schema"
    ):
        follow(fuzzed, "completed")


# --- keys -----------------------------------------------------------------------------------------


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    """``(path, method)`` of everything that the app answers; a mount counts as one path.

    What this does not understand is an error: a route must not be overlooked.
    """

    def walk(found: Sequence[BaseRoute], prefix: str) -> Iterator[tuple[str, str]]:
        for route in found:
            if isinstance(route, Mount):
                yield prefix + route.path, "GET"
            elif isinstance(route, Route):
                assert route.methods
                yield from ((prefix + route.path, method) for method in sorted(route.methods))
            else:  # what FastAPI keeps of a router that was included
                included: Any = route
                inner = included.original_router.routes
                yield from walk(inner, prefix + included.include_context.prefix)

    yield from walk(app.routes, "")


def test_every_route_that_is_not_public_asks_for_a_key(api: Api) -> None:
    asked = []
    for path, method in routes(api.app):
        if path in PUBLIC:
            continue
        concrete = path.replace("{task_id}", "0" * 32).replace("{version}", "v3")
        concrete = concrete.replace("{path:path}", "a/b")
        for key in ("", "frs_" + "x" * 32):
            response = api.request(method, concrete, key=key, json={"image": "x"})
            assert response.status_code == 401, (method, path, response.status_code)
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert response.json()["error_code"] == "invalid_api_key"
        asked.append(path)
    assert len(set(asked)) >= 16
    assert all(path.startswith("/api/") for path in asked), "the middleware guards no others"


def test_what_is_public_is_what_we_think(api: Api) -> None:
    assert {path for path, _ in routes(api.app) if not path.startswith("/api/")} == PUBLIC


@pytest.mark.parametrize(
    "path",
    ["//api/v3/x", "/API/v3/x", "/%61pi/v3/x", "/api%2Fv3/x", "/./api/v3/x", "/x/../api/v3/x",
     "/api/../api/v3/x", "/api/v3/wavespeed-ai/flux-pro-redux/", "/api;x/v3/x"],
)  # fmt: skip
def test_no_way_of_writing_a_path_gets_round_the_key(api: Api, path: str) -> None:
    submit = path.replace("v3/x", "v3/wavespeed-ai/flux-pro-redux")
    response = api.request("POST", submit, key="", json={"image": "https://example.com/a.png"})
    assert response.status_code in (401, 404, 405)
    assert api.services.store.queue_state().waiting == 0
