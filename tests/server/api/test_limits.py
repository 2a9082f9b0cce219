"""A full queue, met before anything was done for the request that it has no place for."""

import asyncio
import http.client
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event

from e2e.live import a_picture, data_uri
from redux_server.api.limits import QueueReservations
from redux_server.api.services import Services
from redux_server.tasks.task import FreePlaces, KeyFull, NewTask, NoRoom
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
    api = build_api(max_queue=5)
    counts: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if re.match(r"SELECT .*count\(", statement, re.DOTALL):
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


# --- the reservations themselves ------------------------------------------------------------------


class Queue:
    """Places that are set by hand; ``counts`` is how often they were counted."""

    def __init__(self, of_all: int, of_key: int = 10**9) -> None:
        self.left = FreePlaces(of_all, of_key)
        self.counts = 0

    def __call__(self, key_ids: Sequence[str]) -> Sequence[FreePlaces]:
        self.counts += 1
        return [self.left] * len(key_ids)


def run(queue: Queue, scene: Callable[[QueueReservations], Any], **more: float) -> None:
    """``scene`` over the reservations of ``queue``; none is left afterwards."""

    async def whole() -> None:
        reservations = QueueReservations(queue, **more)
        try:
            await scene(reservations)
            assert not reservations._reserved
        finally:
            reservations.close()

    asyncio.run(whole())


async def ask(reservations: QueueReservations, key_id: str) -> NoRoom | KeyFull | None:
    with reservations.hold(key_id) as place:
        return await place.refusal()


@pytest.mark.parametrize(
    ("left", "says"),
    [((0, 5), NoRoom()), ((5, 0), KeyFull()), ((-1, -1), KeyFull()), ((1, 1), None)],
)
def test_what_is_full_is_named(left: tuple[int, int], says: Any) -> None:
    async def scene(reservations: QueueReservations) -> None:
        assert await ask(reservations, "a") == says

    run(Queue(*left), scene)


def test_who_never_asks_counts_nothing() -> None:
    queue = Queue(1)

    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a"):
            assert await asyncio.wait_for(ask(reservations, "b"), 5) is None

    run(queue, scene)
    assert queue.counts == 1


@pytest.mark.parametrize("left", [FreePlaces(1, 9), FreePlaces(0, 9)])
def test_first_answer_stands_without_another_count(left: FreePlaces) -> None:
    queue = Queue(left.of_all)

    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a") as place:
            first = await place.refusal()
            queue.left = FreePlaces(1 - left.of_all, 9)
            assert await place.refusal() == first == left.refusal()
            assert reservations._reserved.total() == left.of_all

    run(queue, scene)
    assert queue.counts == 1


@pytest.mark.parametrize("then", [None, NoRoom()])
def test_who_finds_reserved_places_waits_for_what_becomes_of_them(then: NoRoom | None) -> None:
    queue = Queue(1)

    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a") as place:
            assert await place.refusal() is None
            waiting = asyncio.create_task(ask(reservations, "b"))
            while queue.counts < 2:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert not waiting.done()
            if then is not None:
                queue.left = FreePlaces(0, 9)
        assert await asyncio.wait_for(waiting, 20) == then

    run(queue, scene)


def test_count_that_is_older_than_the_end_of_a_reservation_is_not_believed() -> None:
    counted, may_tell = threading.Event(), threading.Event()

    class Slow(Queue):
        def __call__(self, key_ids: Sequence[str]) -> Sequence[FreePlaces]:
            found = super().__call__(key_ids)
            if self.counts == 2:
                counted.set()
                may_tell.wait(20)
            return found

    queue = Slow(1)

    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a") as place:
            assert await place.refusal() is None
            waiting = asyncio.create_task(ask(reservations, "b"))
            await asyncio.to_thread(counted.wait, 20)
            queue.left = FreePlaces(0, 9)  # the first has been accepted
        may_tell.set()
        assert await asyncio.wait_for(waiting, 20) == NoRoom()

    run(queue, scene)
    assert queue.counts == 3


def test_request_that_takes_long_keeps_nobody_out() -> None:
    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("slow") as slow:
            assert await slow.refusal() is None
            assert await asyncio.wait_for(ask(reservations, "quick"), 20) is None
            assert not reservations._reserved, "and it is given back once"

    run(Queue(1), scene, kept_s=0.1)


def test_places_of_other_keys_are_not_waited_for() -> None:
    async def scene(reservations: QueueReservations) -> None:
        with reservations.hold("a") as place:
            assert await place.refusal() is None
            assert await asyncio.wait_for(ask(reservations, "b"), 20) is None

    run(Queue(5, 1), scene)


def test_request_that_is_given_up_frees_its_place() -> None:
    async def scene(reservations: QueueReservations) -> None:
        async def never() -> None:
            with reservations.hold("a") as place:
                await place.refusal()
                await asyncio.Event().wait()

        given_up = asyncio.create_task(never())
        while not reservations._reserved:
            await asyncio.sleep(0.001)
        given_up.cancel()
        assert await asyncio.wait_for(ask(reservations, "a"), 20) is None

    run(Queue(1), scene)
