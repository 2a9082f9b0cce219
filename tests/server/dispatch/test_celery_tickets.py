"""Tickets: how they are asked for, what one does to a worker, and how lost ones are replaced."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine

from e2e.live import wait_until
from redux_server.dispatch.celery import (
    EVERY_S,
    MOST_AT_ONCE,
    PATIENCE_S,
    Reconciler,
    TicketPublisher,
    Turns,
)
from redux_server.dispatch.presence import Presence, WorkerState
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Outcome, Status
from server.in_process import Clock

ticket_consumer = pytest.importorskip(
    "redux_server.dispatch.celery_worker",
    reason="celery is not installed (pip install '.[cluster]')",
)
tickets = pytest.importorskip("redux_server.dispatch.celery")


class Post:
    """A broker in memory: its queue's length, and whether it can be reached."""

    def __init__(self) -> None:
        self.queued = 0
        self.is_away = False
        self.opened = 0
        self.gate = threading.Event()
        self.gate.set()

    def open(self) -> "Post":
        self._reach()
        self.opened += 1
        return self

    def send(self) -> None:
        assert self.gate.wait(20)
        self._reach()
        self.queued += 1

    def waiting(self) -> int:
        self._reach()
        return self.queued

    def _reach(self) -> None:
        if self.is_away:
            raise ConnectionError("nobody listens")


@pytest.fixture
def post() -> Post:
    return Post()


@pytest.fixture
def publisher(post: Post) -> Any:
    publisher = TicketPublisher(post.open)
    publisher.start()
    yield publisher
    post.gate.set()
    publisher.close()


# --- publishing ----------------------------------------------------------------------------------


def test_each_wish_is_a_ticket(post: Post, publisher: TicketPublisher) -> None:
    for expected in (1, 2, 3):
        publisher.add()
        wait_until(lambda expected=expected: post.queued == expected, 10)


def test_wishes_while_the_broker_is_slow_neither_block_nor_gather(
    post: Post, publisher: TicketPublisher
) -> None:
    post.gate.clear()
    began = time.monotonic()
    for _ in range(20_000):
        publisher.add()
    assert time.monotonic() - began < 5
    post.gate.set()
    wait_until(lambda: post.queued >= MOST_AT_ONCE, 10)
    time.sleep(0.2)
    assert post.queued <= 2 * MOST_AT_ONCE


def test_filling_up_counts_what_is_there(post: Post, publisher: TicketPublisher) -> None:
    post.queued = 3
    publisher.fill_up_to(5)
    wait_until(lambda: post.queued == 5, 10)
    publisher.fill_up_to(4)
    publisher.add()
    wait_until(lambda: post.queued == 6, 10)


def test_a_broker_that_comes_back_gets_tickets_again(
    post: Post, publisher: TicketPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redux_server.dispatch.celery._PAUSE_S", 0.05)
    post.is_away = True
    for _ in range(10):
        publisher.add()
        time.sleep(0.02)
    post.is_away = False
    publisher.fill_up_to(2)
    wait_until(lambda: post.queued >= 2, 10)
    assert post.opened == 1


def test_closing_publishes_the_last_wishes_and_waits_for_no_broker(post: Post) -> None:
    publisher = TicketPublisher(post.open)
    publisher.add()
    publisher.start()
    publisher.close()
    assert post.queued == 1
    stuck = TicketPublisher(post.open)
    post.gate.clear()
    stuck.start()
    stuck.add()
    began = time.monotonic()
    stuck.close(patience_s=0.2)
    assert time.monotonic() - began < 5
    post.gate.set()


# --- one ticket ----------------------------------------------------------------------------------


class WakesWorker:
    """A worker that looks, or is too busy, or stops."""

    def __init__(self, *, looks: bool = True, is_stopping: bool = False) -> None:
        self.looks = looks
        self.is_stopping = is_stopping
        self.asked = 0

    def look(self, timeout_s: float) -> bool:
        self.asked += 1
        return self.looks


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    monkeypatch.setattr(
        ticket_consumer, "send_ticket", lambda _app, *, passed_on: found.append(passed_on)
    )
    return found


def test_a_ticket_is_done_when_the_worker_has_looked(passed: list[int]) -> None:
    looker = WakesWorker()
    ticket_consumer.answer(None, looker, 0)
    assert (looker.asked, passed) == (1, [])


def test_a_busy_worker_passes_a_ticket_on_but_not_for_ever(passed: list[int]) -> None:
    busy = WakesWorker(looks=False)
    for passes in range(ticket_consumer.MOST_PASSES + 3):
        ticket_consumer.answer(None, busy, passes)
    assert passed == list(range(1, ticket_consumer.MOST_PASSES + 1))


def test_a_ticket_that_cannot_be_passed_on_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fail(_app: Any, *, passed_on: int) -> None:
        tried.append(passed_on)
        raise OSError("no broker")

    monkeypatch.setattr(ticket_consumer, "send_ticket", fail)
    ticket_consumer.answer(None, WakesWorker(looks=False), 0)
    assert tried == [1]


def test_a_stopping_worker_gives_its_ticket_back_and_fetches_no_more(
    passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticket_consumer.state, "should_stop", None)
    with pytest.raises(ticket_consumer.Reject) as caught:
        ticket_consumer.answer(None, WakesWorker(looks=False, is_stopping=True), 0)
    assert caught.value.requeue
    assert passed == []
    assert ticket_consumer.state.should_stop == 0


def test_servers_with_different_secrets_do_not_share_a_queue() -> None:
    one, other = tickets.queue_name(b"one"), tickets.queue_name(b"other")
    assert one != other
    assert one == tickets.queue_name(b"one")


@pytest.mark.parametrize(
    ("url", "kind", "option"),
    [
        (
            "amqp://guest@mq//",
            {"x-queue-type": "quorum", "x-max-length": 10_000},
            "confirm_publish",
        ),
        ("redis://mq/0", {}, "unacked_restore_interval"),
    ],
)
def test_each_broker_is_used_in_the_way_that_loses_least(
    url: str, kind: dict[str, Any], option: str
) -> None:
    conf = tickets.ticket_app(url, "q").conf
    [queue] = conf.task_queues
    assert queue.queue_arguments == kind
    assert option in conf.broker_transport_options
    assert (conf.task_acks_late, conf.task_reject_on_worker_lost) == (True, True)
    assert (conf.worker_prefetch_multiplier, conf.task_ignore_result) == (1, True)


# --- the reconciler ------------------------------------------------------------------------------


@pytest.fixture
def build_reconciler(
    either_database: Engine, clock: Clock
) -> Callable[[], tuple[Reconciler, list[int]]]:
    def build() -> tuple[Reconciler, list[int]]:
        asked: list[int] = []
        store = TaskStore(either_database, lease_s=30, clock=clock)
        presence = Presence(either_database, clock=clock)
        duties = Turns(either_database, clock=clock)
        return Reconciler(store, presence, duties, asked.append), asked

    return build


def test_what_waits_too_long_or_lost_its_worker_gets_tickets(
    build_reconciler: Any, either_database: Engine, clock: Clock
) -> None:
    store = TaskStore(either_database, lease_s=30, clock=clock)
    presence = Presence(either_database, clock=clock, silent_s=1000)
    presence.announce("a", "cpu", WorkerState.READY)
    presence.announce("b", "cpu", WorkerState.READY)
    presence.announce("c", "cpu", WorkerState.LOADING)
    reconciler, asked = build_reconciler()
    store.accept([NewTask("k", "m", {}) for _ in range(3)], max_open=9)
    assert reconciler.tick() == 0  # young
    clock.now += max(EVERY_S, PATIENCE_S) + 0.1
    assert reconciler.tick() == 3
    assert asked == [2]  # no more than can be woken
    assert len(store.claim("a")) == 1
    clock.now += EVERY_S + 0.1
    assert reconciler.tick() == 2
    clock.now += 31
    assert reconciler.tick() == 3  # the lease ran out
    presence.leave("a")
    presence.leave("b")
    clock.now += EVERY_S + 0.1
    reconciler.tick()
    assert asked[-1] == 1  # someone may be about to be ready


def test_nothing_forgotten_needs_no_ticket(build_reconciler: Any, clock: Clock) -> None:
    reconciler, asked = build_reconciler()
    clock.now += 100
    assert reconciler.tick() == 0
    assert asked == []


def test_several_nodes_take_turns(
    build_reconciler: Any, either_database: Engine, clock: Clock
) -> None:
    TaskStore(either_database, clock=clock).accept([NewTask("k", "m", {})], max_open=9)
    nodes = [build_reconciler() for _ in range(4)]
    for _ in range(40):  # half a minute in which each node asks every three seconds
        clock.now += 0.75
        for reconciler, _ in nodes:
            reconciler.tick()
    assert 8 <= sum(len(asked) for _, asked in nodes) <= 30 / EVERY_S + 1


def test_due_counts_no_more_than_asked_for(either_database: Engine, clock: Clock) -> None:
    store = TaskStore(either_database, lease_s=30, clock=clock)
    store.accept([NewTask("k", "m", {}) for _ in range(10)], max_open=99)
    assert store.due(waiting_s=5, limit=4) == 0
    clock.now += 5.1
    assert store.due(waiting_s=5, limit=4) == 4
    assert store.due(waiting_s=5, limit=100) == 10
    (task,) = store.claim("w")
    store.finish(task.id, 1, Outcome(status=Status.COMPLETED))
    assert store.due(waiting_s=5, limit=100) == 9
