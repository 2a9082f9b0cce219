"""Tickets over real brokers together with claims by scan: whatever happens to the tickets, every
task is done exactly once.

The workers here poll once in an hour, so that nothing but a ticket can make them look.
"""

import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import Engine, select

from e2e.live import wait_until
from e2e.proxy import Proxy
from e2e.services import rabbitmq_url, redis_url
from redux_pipelines.contract.types import GenerationRequest
from redux_pipelines.fake import FakePipeline
from redux_server.database.migration import open_database
from redux_server.database.tables import metadata, tasks
from redux_server.dispatch.presence import Presence, WorkerState
from redux_server.storage.blobs import Blobs
from redux_server.storage.signing import signing_secret
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Status
from redux_server.worker.batch import BatchRunner
from redux_server.worker.loop import Worker
from server.worker_bench import INPUT, Images, Safety

pytest.importorskip("celery", reason="celery is not installed (pip install '.[cluster]')")

from redux_server.dispatch import celery_worker
from redux_server.dispatch.celery import (
    EVERY_S,
    CeleryTicketQueue,
    Reconciler,
    TicketPublisher,
    Turns,
    queue_name,
    send_ticket,
    ticket_app,
    waiting_tickets,
)
from redux_server.dispatch.celery_worker import receiving

WORKERS = 3
TASKS = 40


class CountingPipeline(FakePipeline):
    """Notes which seeds it was asked for, and waits for its gate, if it has one."""

    def __init__(self, seen: Counter[int], gate: Any) -> None:
        super().__init__()
        self.seen = seen
        self.gate = gate

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> Any:
        self.seen.update(request.seed for request in requests)
        if self.gate is None:
            time.sleep(0.02)
        else:
            assert self.gate.wait(90)
        return super().generate_batch(requests)


class LossyQueue:
    """A queue that loses tickets, sends them twice and three times, and late."""

    def __init__(self, queue: CeleryTicketQueue, seed: int) -> None:
        self.queue = queue
        self.random = random.Random(seed)
        self.fates = Counter[str]()
        self.late: list[threading.Timer] = []

    def send(self) -> None:
        fate = self.random.choice(["lost", "lost", "twice", "late", "good"])
        self.fates[fate] += 1
        if fate == "late":
            self.late.append(threading.Timer(self.random.uniform(0.2, 2.0), self.queue.send))
            self.late[-1].start()
        for _ in range({"twice": 3, "good": 1}.get(fate, 0)):
            self.queue.send()

    def waiting(self) -> int:
        return self.queue.waiting()


def _work(
    database_url: str, broker_url: str, folder: Path, name: str, gate: Any, parts: Any
) -> None:
    """A worker process: Celery keeps too much in globals for two consumers in one."""
    ready, may_end, seen_by_all = parts
    engine = open_database(database_url)
    seen = Counter[int]()
    runner = BatchRunner(
        images=Images(),
        pipeline=CountingPipeline(seen, gate),
        safety=Safety(),
        blobs=Blobs(folder),
    )
    worker = Worker(name, store=TaskStore(engine), runner=runner, poll_s=3600.0, defer_s=3600.0)
    thread = threading.Thread(target=worker.run)
    thread.start()
    with receiving(ticket_app(broker_url, queue_name(signing_secret(engine))), worker):
        ready.set()
        may_end.wait()
        worker.stop()
        thread.join()
    seen_by_all.put(dict(seen))
    engine.dispose()


class Fleet:
    """Workers that tickets can wake, over one database and one broker."""

    def __init__(self, engine: Engine, broker_url: str, folder: Path) -> None:
        self.engine = engine
        self.store = TaskStore(engine)
        self.presence = Presence(engine)
        self.broker_url = broker_url
        self.folder = folder
        self.app = ticket_app(broker_url, queue_name(signing_secret(engine)))
        self.open = ExitStack()
        self.fork: Any = multiprocessing.get_context("forkserver")
        self.fork.set_forkserver_preload([__name__])  # import all this once, not in each of them
        self.may_end, self.seen_by_all = self.fork.Event(), self.fork.Queue()
        self.processes: list[Any] = []

    def start_workers(self, *names: str, gate: Any = None) -> None:
        url = self.engine.url.render_as_string(hide_password=False)
        waits = []
        for name in names:
            ready = self.fork.Event()
            parts = (ready, self.may_end, self.seen_by_all)
            given = (url, self.broker_url, self.folder, name, gate, parts)
            self.processes.append(self.fork.Process(target=_work, args=given))
            self.processes[-1].start()
            waits.append(ready)
            self.presence.announce(name, "cpu", WorkerState.READY)
        assert all(ready.wait(90) for ready in waits)

    def stop_workers(self) -> Counter[int]:
        """End them; returns how often each seed was worked on."""
        self.may_end.set()
        seen = Counter[int]()
        for _ in self.processes:
            seen.update(self.seen_by_all.get(timeout=60))
        for process in self.processes:
            process.join(30)
            assert process.exitcode == 0
        self.processes.clear()
        return seen

    def accept(self, seed: int) -> str:
        new = NewTask("k", "m", {**INPUT, "seed": seed})
        self.store.accept([new], max_open=1000)
        return new.id

    def are_ended(self, ids: list[str]) -> bool:
        return all(task and task.status.is_terminal for task in self.store.get(ids))

    def close(self) -> None:
        self.may_end.set()
        for process in self.processes:
            process.join(20)
            process.kill()
        self.open.close()
        [queue] = self.app.conf.task_queues
        with self.app.connection_for_write() as connection, connection.channel() as channel:
            queue(channel).delete()
        self.app.close()


@pytest.fixture(params=[rabbitmq_url, redis_url], ids=["rabbitmq", "redis"])
def fleet(request: pytest.FixtureRequest, postgres_url: str, tmp_path: Path) -> Iterator[Fleet]:
    url = request.param()
    engine = open_database(postgres_url)
    _clear(engine)
    fleet = Fleet(engine, url, tmp_path / "blobs")
    yield fleet
    fleet.close()
    engine.dispose()


def _clear(engine: Engine) -> None:
    with engine.begin() as db:
        for table in metadata.sorted_tables:
            db.execute(table.delete())


def _publisher(fleet: Fleet, wrap: Callable[[CeleryTicketQueue], Any] = lambda queue: queue) -> Any:
    publisher = TicketPublisher(lambda: wrap(CeleryTicketQueue(fleet.app)))
    publisher.start()
    fleet.open.callback(publisher.close)
    return publisher


@pytest.mark.cluster
def test_a_ticket_wakes_a_worker_at_once(fleet: Fleet) -> None:
    fleet.start_workers("a")
    publisher = _publisher(fleet)
    time.sleep(2.0)  # the worker has looked at its start, and sleeps now
    task_id = fleet.accept(1)
    time.sleep(0.5)
    assert not fleet.are_ended([task_id])  # nobody was told
    publisher.add()
    wait_until(lambda: fleet.are_ended([task_id]), 20)
    wait_until(lambda: waiting_tickets(fleet.app) == 0, 10)


@pytest.mark.cluster
def test_tickets_that_find_no_work_are_used_up(fleet: Fleet) -> None:
    for _ in range(20):
        send_ticket(fleet.app)
    assert waiting_tickets(fleet.app) == 20
    fleet.start_workers("a")
    wait_until(lambda: waiting_tickets(fleet.app) == 0, 20)


@pytest.mark.cluster
def test_a_busy_worker_leaves_tickets_to_an_idle_one(fleet: Fleet) -> None:
    gate = fleet.fork.Event()
    fleet.start_workers("busy", gate=gate)
    publisher = _publisher(fleet)
    slow = [fleet.accept(1)]
    publisher.add()
    wait_until(lambda: _owner(fleet, slow[0]) == "busy", 20)
    fleet.start_workers("idle")
    quick = []
    for seed in (3, 4, 5):
        quick.append(fleet.accept(seed))
        publisher.add()
        wait_until(lambda: fleet.are_ended(quick), 20)
    assert not fleet.are_ended(slow)
    assert {_owner(fleet, task_id) for task_id in quick} == {"idle"}
    gate.set()
    wait_until(lambda: fleet.are_ended(slow), 30)


@pytest.mark.cluster
def test_every_task_is_done_exactly_once_whatever_happens_to_its_ticket(fleet: Fleet) -> None:
    seed = random.SystemRandom().randrange(2**32)
    post: list[LossyQueue] = []

    def wrap(queue: CeleryTicketQueue) -> LossyQueue:
        post.append(LossyQueue(queue, seed))
        return post[-1]

    publisher = _publisher(fleet, wrap)
    fleet.start_workers(*(f"w{number}" for number in range(WORKERS)))
    reconcilers = [
        Reconciler(fleet.store, fleet.presence, Turns(fleet.engine), publisher.fill_up_to)
        for _ in range(2)
    ]
    ids = []
    for number in range(TASKS):
        ids.append(fleet.accept(number))
        publisher.add()
        if number == TASKS // 2:
            _purge(fleet)
        time.sleep(0.03)

    def is_done() -> bool:
        for reconciler in reconcilers:
            reconciler.tick()
        return fleet.are_ended(ids)

    wait_until(is_done, 60, every_s=EVERY_S / 10, what=lambda: f"{post[0].fates}, seed {seed}")
    for timer in post[0].late:
        timer.join()
    found = fleet.store.get(ids)
    assert {task.status for task in found if task} == {Status.COMPLETED}
    assert {task.attempt for task in found if task} == {1}
    assert fleet.stop_workers() == {number: 1 for number in range(TASKS)}, f"seed {seed}"
    assert post[0].fates["lost"] > 0 and post[0].fates["twice"] > 0


def _owner(fleet: Fleet, task_id: str) -> str | None:
    with fleet.engine.connect() as db:
        return db.scalar(select(tasks.c.owner).where(tasks.c.id == task_id))


def _purge(fleet: Fleet) -> None:
    [queue] = fleet.app.conf.task_queues
    with fleet.app.connection_for_write() as connection, connection.channel() as channel:
        queue(channel).purge()


@pytest.mark.parametrize("broker", [rabbitmq_url, redis_url], ids=["rabbitmq", "redis"])
@pytest.mark.cluster
def test_a_broker_that_comes_back_is_used_again(
    broker: Callable[[], str], postgres_url: str, tmp_path: Path
) -> None:
    parts = urlsplit(broker())
    engine = open_database(postgres_url)
    _clear(engine)
    with Proxy((parts.hostname or "", parts.port or 0)) as proxy:
        account = f"{parts.username}:{parts.password}@" if parts.username else ""
        url = f"{parts.scheme}://{account}127.0.0.1:{proxy.port}{parts.path}"
        fleet = Fleet(engine, url, tmp_path / "blobs")
        try:
            fleet.start_workers("a")
            publisher = _publisher(fleet)
            task_id = fleet.accept(1)
            publisher.add()
            wait_until(lambda: fleet.are_ended([task_id]), 20)
            proxy.cut()
            unheard = fleet.accept(2)
            for _ in range(5):
                began = time.monotonic()
                publisher.add()
                assert time.monotonic() - began < 1
                time.sleep(0.5)
            assert not fleet.are_ended([unheard])
            proxy.mend()

            def is_heard() -> bool:
                publisher.fill_up_to(1)
                return fleet.are_ended([unheard])

            wait_until(is_heard, 40, every_s=1.0)
        finally:
            fleet.close()
            engine.dispose()


# --- One ticket -----------------------------------------------------------------------------------


class LookingWorker:
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
        celery_worker, "send_ticket", lambda _app, *, passed_on: found.append(passed_on)
    )
    return found


def test_a_ticket_is_done_when_the_worker_has_looked(passed: list[int]) -> None:
    worker = LookingWorker()
    celery_worker.answer(None, worker, 0)
    assert (worker.asked, passed) == (1, [])


def test_a_busy_worker_passes_a_ticket_on_but_not_for_ever(passed: list[int]) -> None:
    busy = LookingWorker(looks=False)
    for passes in range(celery_worker.MOST_PASSES + 3):
        celery_worker.answer(None, busy, passes)
    assert passed == list(range(1, celery_worker.MOST_PASSES + 1))


def test_a_ticket_that_cannot_be_passed_on_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fail(_app: Any, *, passed_on: int) -> None:
        tried.append(passed_on)
        raise OSError("no broker")

    monkeypatch.setattr(celery_worker, "send_ticket", fail)
    celery_worker.answer(None, LookingWorker(looks=False), 0)
    assert tried == [1]


def test_a_stopping_worker_gives_its_ticket_back_and_fetches_no_more(
    passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(celery_worker.state, "should_stop", None)
    with pytest.raises(celery_worker.Reject) as caught:
        celery_worker.answer(None, LookingWorker(looks=False, is_stopping=True), 0)
    assert caught.value.requeue
    assert passed == []
    assert celery_worker.state.should_stop == 0
