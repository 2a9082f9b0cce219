"""A full queue, met before anything was done for the request that it has no place for."""

import asyncio
import http.client
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import pytest

from e2e.live import a_picture, data_uri
from redux_server.api.limits import QueueReservations
from redux_server.api.services import Services
from redux_server.tasks.task import FreePlaces, KeyFull, NewTask, QueueFull
from server.api.test_http_server import serving
from server.in_process import Api

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
URL = {"image": "https://example.com/a.png"}
INLINE = {"image": data_uri(a_picture())}
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
    api = build_api(**{limit: 30})
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


# --- the places themselves ------------------------------------------------------------------------


class Queue:
    """Places that are set by hand; ``looks`` counts the reads."""

    def __init__(self, of_all: int, of_key: int = 10**9) -> None:
        self.left = FreePlaces(of_all, of_key)
        self.looks = 0

    def __call__(self, key_ids: Sequence[str]) -> Sequence[FreePlaces]:
        self.looks += 1
        return [self.left] * len(key_ids)


@pytest.mark.parametrize(
    ("left", "says"),
    [((0, 5), QueueFull()), ((5, 0), KeyFull()), ((-1, -1), KeyFull()), ((1, 1), None)],
)
def test_what_is_full_is_named(left: tuple[int, int], says: Any) -> None:
    async def scenario() -> None:
        places = QueueReservations(Queue(*left))
        assert await places.look("a") == says
        async with places.hold("a") as refusal:
            assert refusal == says
        places.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("then", [None, QueueFull()])
def test_who_finds_held_places_waits_for_what_becomes_of_them(then: QueueFull | None) -> None:
    async def scenario() -> None:
        queue = Queue(1)
        places = QueueReservations(queue)

        async def second() -> QueueFull | KeyFull | None:
            async with places.hold("b") as refusal:
                return refusal

        async with places.hold("a"):
            waiting = asyncio.create_task(second())
            while queue.looks < 2:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert not waiting.done()
            if then is not None:
                queue.left = FreePlaces(0, 9)
        assert await asyncio.wait_for(waiting, 20) == then
        places.close()

    asyncio.run(scenario())


def test_places_of_other_keys_are_not_waited_for() -> None:
    async def scenario() -> None:
        places = QueueReservations(Queue(5, 1))
        async with places.hold("a"), asyncio.timeout(20), places.hold("b") as refusal:
            assert refusal is None
        assert not places._taken_soon
        places.close()

    asyncio.run(scenario())
