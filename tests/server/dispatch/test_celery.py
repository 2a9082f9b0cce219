"""Tickets: how they are asked for and published, and how lost ones are replaced, by turns."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine

from e2e.live import wait_until
from redux_server.database.migration import open_database
from redux_server.dispatch.presence import Presence, WorkerState
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Outcome, Status
from server.in_process import Clock

pytest.importorskip("celery", reason="celery is not installed (pip install '.[cluster]')")

from redux_server.dispatch.celery import (
    EVERY_S,
    MOST_AT_ONCE,
    PATIENCE_S,
    Reconciler,
    TicketPublisher,
    Turns,
    queue_name,
    ticket_app,
)


class QueueInMemory:
    """A broker in memory: its queue's length, and whether it can be reached."""

    def __init__(self) -> None:
        self.queued = 0
        self.is_away = False
        self.opened = 0
        self.gate = threading.Event()
        self.gate.set()

    def open(self) -> "QueueInMemory":
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
def queue() -> QueueInMemory:
    return QueueInMemory()


@pytest.fixture
def publisher(queue: QueueInMemory) -> Any:
    publisher = TicketPublisher(queue.open)
    publisher.start()
    yield publisher
    queue.gate.set()
    publisher.close()


# --- publishing -----------------------------------------------------------------------------------


def test_each_call_is_a_ticket(queue: QueueInMemory, publisher: TicketPublisher) -> None:
    for expected in (1, 2, 3):
        publisher.add()
        wait_until(lambda expected=expected: queue.queued == expected, 10)


def test_calls_while_the_broker_is_slow_neither_block_nor_gather(
    queue: QueueInMemory, publisher: TicketPublisher
) -> None:
    queue.gate.clear()
    began = time.monotonic()
    for _ in range(20_000):
        publisher.add()
    assert time.monotonic() - began < 5
    queue.gate.set()
    wait_until(lambda: queue.queued >= MOST_AT_ONCE, 10)
    time.sleep(0.2)
    assert queue.queued <= 2 * MOST_AT_ONCE


def test_filling_up_counts_what_is_there(queue: QueueInMemory, publisher: TicketPublisher) -> None:
    queue.queued = 3
    publisher.fill_up_to(5)
    wait_until(lambda: queue.queued == 5, 10)
    publisher.fill_up_to(4)
    publisher.add()
    wait_until(lambda: queue.queued == 6, 10)


def test_a_broker_that_comes_back_gets_tickets_again(
    queue: QueueInMemory, publisher: TicketPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redux_server.dispatch.celery._PAUSE_S", 0.05)
    queue.is_away = True
    for _ in range(10):
        publisher.add()
        time.sleep(0.02)
    queue.is_away = False
    publisher.fill_up_to(2)
    wait_until(lambda: queue.queued >= 2, 10)
    assert queue.opened == 1


def test_closing_publishes_what_was_asked_for_last_and_waits_for_no_broker(
    queue: QueueInMemory,
) -> None:
    publisher = TicketPublisher(queue.open)
    publisher.add()
    publisher.start()
    publisher.close()
    assert queue.queued == 1
    stuck = TicketPublisher(queue.open)
    queue.gate.clear()
    stuck.start()
    stuck.add()
    began = time.monotonic()
    stuck.close(patience_s=0.2)
    assert time.monotonic() - began < 5
    queue.gate.set()


# --- one ticket -----------------------------------------------------------------------------------


def test_servers_with_different_secrets_do_not_share_a_queue() -> None:
    one, other = queue_name(b"one"), queue_name(b"other")
    assert one != other
    assert one == queue_name(b"one")


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
    conf = ticket_app(url, "q").conf
    [queue] = conf.task_queues
    assert queue.queue_arguments == kind
    assert option in conf.broker_transport_options
    assert (conf.task_acks_late, conf.task_reject_on_worker_lost) == (True, True)
    assert (conf.worker_prefetch_multiplier, conf.task_ignore_result) == (1, True)


# --- turns ----------------------------------------------------------------------------------------


def test_a_turn_is_given_out_once_in_its_time(either_database: Engine, clock: Clock) -> None:
    one, other = (Turns(either_database, clock=clock) for _ in range(2))
    assert one.take("sweep", every_s=10)
    assert not one.take("sweep", every_s=10)
    assert not other.take("sweep", every_s=10)
    assert other.take("count", every_s=10)
    clock.now += 9.9
    assert not other.take("sweep", every_s=10)
    clock.now += 0.2
    assert other.take("sweep", every_s=10)
    assert not one.take("sweep", every_s=10)


def test_a_clock_set_back_by_an_hour_stops_no_turn(either_database: Engine, clock: Clock) -> None:
    turns = Turns(either_database, clock=clock)
    assert turns.take("sweep", every_s=10)
    clock.now -= 3600
    assert turns.take("sweep", every_s=10)


@pytest.mark.parametrize("is_known", [False, True])
def test_processes_that_ask_at_once_get_it_once(
    either_database: Engine, clock: Clock, is_known: bool
) -> None:
    if is_known:
        Turns(either_database, clock=clock).take("sweep", every_s=10)
        clock.now += 11
    url = either_database.url.render_as_string(hide_password=False)
    engines = [open_database(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        given = list(
            pool.map(lambda engine: Turns(engine, clock=clock).take("sweep", every_s=10), engines)
        )
    assert sorted(given) == [False, False, False, True]
    for engine in engines:
        engine.dispose()


# --- the reconciler -------------------------------------------------------------------------------


@pytest.fixture
def build_reconciler(
    either_database: Engine, clock: Clock
) -> Callable[[], tuple[Reconciler, list[int]]]:
    def build() -> tuple[Reconciler, list[int]]:
        asked: list[int] = []
        store = TaskStore(either_database, lease_s=30, clock=clock)
        presence = Presence(either_database, clock=clock)
        turns = Turns(either_database, clock=clock)
        return Reconciler(store, presence, turns, asked.append), asked

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
