"""Whether a submit is let in: a full queue, limits per key, and unusable idempotency keys."""

import asyncio
import http.client
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event

from e2e.live import a_picture, data_uri
from redux_server.api.services import Services
from redux_server.dispatch.presence import WorkerState
from redux_server.storage.blobs import MARKER
from redux_server.tasks.task import NewTask, Outcome, Status
from server.in_process import INLINE, SUBMIT, URL, Api, Clock, serving
from server.stored_tasks import count_rows

LARGE = {"image": "https://example.com/a.png", "prompt": "x" * 1800, "unknown": "y" * 2**20}
KEY = {"Idempotency-Key": "once"}


def at_once(api: Api, *bodies: dict[str, Any], headers: dict[str, str] | None = None) -> list[Any]:
    async def flood() -> list[httpx.Response]:
        transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
        named = {"Authorization": f"Bearer {api.key}", **(headers or {})}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            posts = [client.post(SUBMIT, json=body, headers=named) for body in bodies]
            return await asyncio.gather(*posts)

    return api._runner.run(flood())


# --- a full queue ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["max_queue", "max_open_per_key"])
@pytest.mark.parametrize("headers", [{}, KEY], ids=["plain", "idempotent"])
def test_picture_that_has_no_place_is_never_stored(
    build_api: Callable[..., Api], stored: list[str], limit: str, headers: dict[str, str]
) -> None:
    api = build_api(**{limit: 1})
    task_id = api.post(SUBMIT, json=INLINE).json()["data"]["id"]
    answer = api.post(SUBMIT, json=INLINE, headers=headers)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    assert stored == [f"{task_id}/input"]


def test_one_place_is_filled_by_one_picture_whoever_comes_at_once(
    build_api: Callable[..., Api], stored: list[str]
) -> None:
    api = build_api(max_queue=1)
    answers = at_once(api, *[INLINE] * 20)
    assert sorted(answer.status_code for answer in answers) == [200] + [429] * 19
    assert len(stored) == 1


@pytest.mark.parametrize("limit", ["max_queue", "max_open_per_key"])
def test_as_many_as_there_are_places_for_are_accepted_at_once(
    build_api: Callable[..., Api], limit: str
) -> None:
    api = build_api(queue_share=100, **{limit: 30})
    answers = at_once(api, *[INLINE] * 20, *[URL] * 10)
    assert [answer.status_code for answer in answers] == [200] * 30


def test_twins_with_one_idempotency_key_are_one_task_in_the_last_place(
    build_api: Callable[..., Api],
) -> None:
    api = build_api(max_queue=1)
    answers = at_once(api, *[INLINE] * 5, headers=KEY)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["data"]["id"] for answer in answers}) == 1


def test_place_of_a_request_that_failed_goes_to_the_one_behind(
    build_api: Callable[..., Api],
) -> None:
    api = build_api(max_queue=1)
    answers = at_once(api, {"image": "data:image/png;base64,AAAA"}, INLINE)
    assert answers[0].status_code in (400, 429), "before the other, or after it"
    assert answers[1].status_code == 200


def test_twins_of_a_large_request_are_one_task_in_the_last_place(
    build_api: Callable[..., Api],
) -> None:
    api = build_api(max_queue=1)
    answers = at_once(api, *[LARGE] * 5, headers=KEY)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["data"]["id"] for answer in answers}) == 1


# --- before the body is read ----------------------------------------------------------------------


async def no_json(taken: list[int]) -> AsyncIterator[bytes]:
    for _ in range(20):
        taken.append(1)
        yield b"x" * 10_000


@pytest.mark.parametrize(("expect", "parts"), [("", 20), ("100-continue", 0)])
def test_large_body_is_discarded_or_not_asked_for(
    build_api: Callable[..., Api], expect: str, parts: int
) -> None:
    api = build_api(max_queue=1)
    api.post(SUBMIT, json=URL)
    taken: list[int] = []
    headers = {"Expect": expect} if expect else {}
    answer = api.post(SUBMIT, content=no_json(taken), headers=headers)
    assert answer.status_code == 429, "it was parsed"
    assert len(taken) == parts
    assert ("close" in answer.headers.get("connection", "")) is bool(expect)


def test_large_repeated_request_has_its_task_whatever_the_queue_has(
    build_api: Callable[..., Api],
) -> None:
    api = build_api(max_queue=1)
    first = api.post(SUBMIT, json=LARGE, headers=KEY).json()
    assert api.post(SUBMIT, json=LARGE, headers=KEY).json() == first
    stranger = api.services.keys.create("stranger")
    assert api.post(SUBMIT, json=LARGE, headers=KEY, key=stranger).status_code == 429
    other = api.post(SUBMIT, json={**LARGE, "seed": 1}, headers=KEY)
    assert other.json()["error_code"] == "idempotency_conflict"


def test_connection_of_a_discarded_body_can_be_used_again(
    build_services: Callable[..., Services], build_api: Callable[..., Api]
) -> None:
    api = build_api(build_services(max_queue=1))
    api.services.store.accept([NewTask("k", "m", {})], max_open=9)
    named = {"Authorization": f"Bearer {api.key}"}
    with serving(api.app) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        for _ in range(2):
            connection.request("POST", SUBMIT, body=b"x" * 2**21, headers=named)
            answer = connection.getresponse()
            assert (answer.status, b"queue_full" in answer.read()) == (429, True)
            same = connection.sock
        assert connection.sock is same
        connection.close()


def test_client_that_asks_first_is_refused_without_being_told_to_send(
    build_services: Callable[..., Services], build_api: Callable[..., Api]
) -> None:
    api = build_api(build_services(max_queue=1))
    api.services.store.accept([NewTask("k", "m", {})], max_open=9)
    head = (
        f"POST {SUBMIT} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {api.key}\r\n"
        f"Content-Length: {2**21}\r\nExpect: 100-continue\r\n\r\n"
    )
    with serving(api.app) as port, socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(head.encode())
        received = b""
        while more := client.recv(2**16):  # up to the end of the connection
            received += more
    assert received.startswith(b"HTTP/1.1 429 "), "neither 100 nor anything else came before"
    assert b"retry-after: 5" in received.lower()


def test_bodies_that_never_come_keep_nobody_out_of_the_queue(
    build_services: Callable[..., Services], build_api: Callable[..., Api]
) -> None:
    api = build_api(build_services(max_queue=1))
    head = (
        f"POST {SUBMIT} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {api.key}\r\n"
        f"Content-Length: {2**20}\r\n\r\n{{"
    )
    named = {"Authorization": f"Bearer {api.key}"}
    with serving(api.app) as port, ExitStack() as stalled:
        for _ in range(8):
            client = stalled.enter_context(socket.create_connection(("127.0.0.1", port), 20))
            client.sendall(head.encode())
        time.sleep(0.5)  # every one of them has been looked at
        url = f"http://127.0.0.1:{port}{SUBMIT}"
        answer = httpx.post(url, json=INLINE, headers=named, timeout=15)
        assert answer.status_code == 200


# --- how often room is counted --------------------------------------------------------------------


LARGE_INLINE = {**INLINE, "unknown": "y" * 2**17}


@pytest.mark.parametrize("headers", [{}, KEY], ids=["plain", "idempotent"])
@pytest.mark.parametrize(
    ("body", "early"),
    [(URL, 0), (LARGE, 1), (INLINE, 1), (LARGE_INLINE, 1)],
    ids=["url", "large url", "inline", "large inline"],
)
def test_room_is_counted_once_before_the_transaction(
    build_api: Callable[..., Api],
    database: Engine,
    body: dict[str, Any],
    early: int,
    headers: dict[str, str],
) -> None:
    api = build_api(max_queue=5, queue_share=100)
    counts: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if re.match(r"SELECT \(SELECT count\(", statement):  # of all; that of a key goes with it
            counts.append(statement)

    event.listen(database, "before_cursor_execute", note)
    assert api.post(SUBMIT, json=body, headers=headers).status_code == 200
    assert len(counts) == early + 1


def test_place_is_free_for_others_while_a_request_is_held_for_its_end(
    build_api: Callable[..., Api],
) -> None:
    api = build_api(sync_timeout_s=0.1)
    assert api.post(SUBMIT, json={**INLINE, "enable_sync_mode": True}).status_code == 200
    assert not api.services.reservations._reserved


# --- the limits per key ---------------------------------------------------------------------------


def check_429(response: Any, name: str, *says: str) -> None:
    assert response.status_code == 429, response.text
    body = response.json()
    assert set(body) == {"code", "message", "error", "error_code", "data"}
    assert (body["code"], body["error_code"], body["data"]) == (429, name, None)
    assert all(part in body["message"] for part in says), body["message"]
    assert int(response.headers["retry-after"]) >= 1


def test_key_that_submits_too_often_is_told_when_to_come_back(
    build_api: Callable[..., Api],
    build_services: Callable[..., Services],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = build_services(rate_limit=3)
    monkeypatch.setattr(services.rate, "_clock", clock)
    api = build_api(services)
    for _ in range(3):
        assert api.post(SUBMIT, json=URL).status_code == 200
    refused = api.post(SUBMIT, json=URL)
    check_429(refused, "rate_limited", "3 tasks a minute", "20 s")
    assert refused.headers["retry-after"] == "20"
    assert api.services.store.queue_state().waiting == 3
    other = api.services.keys.create("other")
    assert api.post(SUBMIT, json=URL, key=other).status_code == 200
    clock.now += 20
    assert api.post(SUBMIT, json=URL).status_code == 200


def test_polls_are_not_limited(build_api: Callable[..., Api]) -> None:
    api = build_api(rate_limit=1)
    task = api.post(SUBMIT, json=URL).json()["data"]
    statuses = {api.get(f"/api/v3/predictions/{task['id']}/result").status_code for _ in range(20)}
    assert statuses == {200}


def test_refused_for_its_rate_before_its_body_is_read(build_api: Callable[..., Api]) -> None:
    api = build_api(rate_limit=1)
    api.post(SUBMIT, json=URL)
    taken = []

    async def body() -> Any:
        for _ in range(100):
            taken.append(1)
            yield b" " * 1000

    assert api.post(SUBMIT, content=body()).status_code == 429
    assert taken == []


def test_key_with_enough_open_tasks_is_refused_until_one_ends(
    build_api: Callable[..., Api],
) -> None:
    api = build_api(max_open_per_key=2)
    for _ in range(2):
        assert api.post(SUBMIT, json=URL).status_code == 200
    check_429(api.post(SUBMIT, json=URL), "queue_full", "has 2 open tasks")
    assert api.post(SUBMIT, json=URL, key=api.services.keys.create("b")).status_code == 200
    [task] = api.services.store.claim("w")
    assert api.services.store.finish(task.id, task.attempt, Outcome(Status.COMPLETED))
    assert api.post(SUBMIT, json=URL).status_code == 200


def test_picture_of_a_refused_task_is_not_kept(build_api: Callable[..., Api]) -> None:
    api = build_api(max_open_per_key=1)
    body = {"image": data_uri(a_picture())}
    accepted = api.post(SUBMIT, json=body).json()["data"]["id"]
    check_429(api.post(SUBMIT, json=body), "queue_full")
    folders = {
        path.name for path in api.services.settings.blobs_dir.iterdir() if any(path.iterdir())
    }
    assert folders == {accepted, MARKER.partition("/")[0]}


def test_neither_limit_is_set_by_default(build_services: Callable[..., Services]) -> None:
    settings = build_services().settings
    assert (settings.rate_limit, settings.max_open_per_key) == (0, 0)


# --- no worker ------------------------------------------------------------------------------------


def test_nothing_is_accepted_while_no_worker_can_load_its_model(api: Api, database: Engine) -> None:
    presence = api.services.presence
    presence.announce("a", "cuda:0", WorkerState.FAILED, "the hub cannot be reached")
    refused = api.post(SUBMIT, json=URL)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "30")
    assert "nothing was started: the hub cannot be reached" in refused.json()["message"]
    assert count_rows(database) == 0
    presence.announce("a", "cuda:0", WorkerState.LOADING, "starting")
    assert api.post(SUBMIT, json=URL).status_code == 200
    presence.announce("b", "cuda:1", WorkerState.READY)
    presence.announce("a", "cuda:0", WorkerState.FAILED, "the hub cannot be reached")
    assert api.post(SUBMIT, json=URL).status_code == 200, "one that works is enough"


def test_a_submit_without_a_worker_says_so_and_so_do_its_polls(api: Api) -> None:
    answer = api.post(SUBMIT, json=URL)
    data = answer.json()["data"]
    assert (answer.status_code, answer.headers["workers-ready"]) == (200, "0")
    assert data["progress"]["waiting_for"] == "a worker; none is ready"
    polled = api.get(f"/api/v3/predictions/{data['id']}/result").json()["data"]
    assert polled["progress"]["waiting_for"] == "a worker; none is ready"
    api.services.presence.announce("a", "cpu", WorkerState.READY, fingerprint="aaa/1")
    polled = api.get(f"/api/v3/predictions/{data['id']}/result").json()["data"]
    assert "waiting_for" not in polled["progress"]
    answer = api.post(SUBMIT, json=URL)
    assert "workers-ready" not in answer.headers
    assert "waiting_for" not in answer.json()["data"]["progress"]


def test_a_task_is_bound_to_what_the_workers_of_its_time_run(api: Api) -> None:
    presence = api.services.presence
    presence.announce("a", "cpu", WorkerState.READY, fingerprint="aaa/1")
    bound = api.post(SUBMIT, json=URL).json()["data"]["id"]
    [task] = api.services.store.get([bound])
    assert task is not None and task.fingerprint == "aaa/1"
    presence.announce("a", "cpu", WorkerState.READY, fingerprint="bbb/1")
    polled = api.get(f"/api/v3/predictions/{bound}").json()["data"]
    assert "the weights aaa and version 1" in polled["progress"]["waiting_for"]


# --- the idempotency key --------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", "é".encode("latin-1")])
def test_unusable_key_is_refused(api: Api, database: Engine, key: Any) -> None:
    answer = api.post(SUBMIT, json=URL, headers={"Idempotency-Key": key})
    assert answer.status_code == 400
    assert "Idempotency-Key must be 1 to 255 printable ASCII" in answer.json()["message"]
    assert count_rows(database) == 0


def test_longest_key_is_taken(api: Api) -> None:
    headers = {"Idempotency-Key": "x" * 255}
    answers = [api.post(SUBMIT, json=URL, headers=headers) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
