"""The sender of webhooks: nothing is lost, and nobody is kept waiting by the slow."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import Engine, insert, select, update
from sqlalchemy.exc import OperationalError

from e2e.live import ROOT, wait_until
from redux_server.database.tables import webhooks
from redux_server.net.guard import FetchError
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Outcome, Status
from redux_server.webhooks.callback import Callback
from redux_server.webhooks.delivery import TaskGone, webhook_secret
from redux_server.webhooks.outbox import Delivery, Outbox
from redux_server.webhooks.sender import Limits, WebhookSender
from server.in_process import end_next
from server.receiver import Received, is_signed, receiving

INPUT = {"image": "https://example.com/a.png", "num_inference_steps": 28, "num_images": 1}


def add(
    engine: Engine, count: int, *, host: str = "a.example", key: str = "k", due_at: float = 1.0
) -> list[str]:
    ids = [f"{host}-{key}-{number}" for number in range(count)]
    hook = Callback(f"https://{host}/", "http://test/").stored()
    row = {"key_id": key, "url": hook, "created_at": time.time()}
    rows = [
        {**row, "task_id": task_id, "next_at": due_at + n / 1000} for n, task_id in enumerate(ids)
    ]
    with engine.begin() as db:
        db.execute(insert(webhooks), rows)
    return ids


@contextmanager
def running(
    engine: Engine, deliver: Callable[[Delivery], None], **options: Any
) -> Iterator[Outbox]:
    outbox = Outbox(engine, hold_s=60.0)
    sender = WebhookSender(outbox, deliver, **{"poll_s": 0.02, **options})
    sender.start()
    try:
        yield outbox
    finally:
        sender.stop(grace_s=30)


def counted(result: str) -> float:
    labels = {"result": result}
    return REGISTRY.get_sample_value("flux_redux_webhook_deliveries_total", labels) or 0.0


def stored(engine: Engine) -> dict[str, Any]:
    with engine.connect() as db:
        return {row.task_id: row for row in db.execute(select(webhooks))}


# --- nothing is lost ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_is_lost_though_half_of_the_tries_fail_and_the_process_is_killed(
    database: Engine, count: int
) -> None:
    """The receiver kills the sender in mid-delivery; a second one takes over the database."""
    lock, luck = threading.Lock(), random.Random(7)
    calls: list[tuple[Received, int]] = []
    processes: list[subprocess.Popen[bytes]] = []
    cut_short: list[str] = []

    def answer(call: Received) -> int:
        with lock:
            if len(calls) == count // 3 and not cut_short:
                cut_short.append(call.id)
                os.kill(processes[0].pid, signal.SIGKILL)
                return 500
            status = luck.choice([200, 500])
            calls.append((call, status))
            return status

    with receiving(answer) as port:
        ids = end_tasks(database, count, f"http://127.0.0.1:{port}/hook")
        secret = webhook_secret(database, "k")
        outbox = Outbox(database, hold_s=1.0)
        try:
            processes.append(start_process(database))
            assert processes[0].wait(120) == -signal.SIGKILL
            assert 0 < outbox.count_open() < count
            expire_claims(database)
            processes.append(start_process(database))
            wait_until(lambda: outbox.count_open() == 0, 30 + count)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    told = Counter(call.id for call, status in calls if status == 200)
    assert set(told) == set(ids)
    assert cut_short[0] in told
    # Exactly once, but for those whose answer died with the first process.
    assert sum(told.values()) - count <= Limits().in_all
    assert all(is_signed(call, secret) for call, _ in calls)
    assert all(json.loads(call.body)["id"] == call.id for call, _ in calls)
    failed = sum(status == 500 for _, status in calls)
    assert 0.35 * len(calls) < failed < 0.65 * len(calls)
    assert all(row.delivered_at for row in stored(database).values())


def end_tasks(engine: Engine, count: int, url: str) -> list[str]:
    store = TaskStore(engine)
    hook = Callback(url, "http://127.0.0.1:8000/").stored()
    store.accept([NewTask("k", "m", INPUT, webhook_url=hook) for _ in range(count)], max_open=count)
    ids = []
    outcomes = [Outcome(Status.COMPLETED), Outcome.failure(1402, "no picture")]
    while task := end_next(store, outcomes[len(ids) % 2]):
        ids.append(task.id)
    assert len(ids) == count
    return ids


def start_process(engine: Engine) -> "subprocess.Popen[bytes]":
    paths = [str(ROOT / name) for name in ("server", "pipelines", "kernels", "weights")]
    command = [sys.executable, str(Path(__file__).with_name("send_webhooks.py")), str(engine.url)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def expire_claims(engine: Engine) -> None:
    """Spare the test the seconds after which claims of a dead process run out by themselves."""
    with engine.begin() as db:
        claimed = update(webhooks).where(webhooks.c.next_at > time.time() + 1)
        assert db.execute(claimed.values(next_at=time.time())).rowcount >= 1


def test_tries_end_after_the_schedule_and_that_is_seen(database: Engine) -> None:
    tries: list[int] = []
    before = counted("given_up"), counted("failed")

    def deliver(delivery: Delivery) -> None:
        tries.append(delivery.tries)
        raise FetchError("status", "The host 'a.example' answered with status 500.")

    add(database, 1)
    pauses = {1: 0.0, 2: 0.0, 3: None}
    with running(database, deliver, pause_s=pauses.__getitem__) as outbox:
        wait_until(lambda: outbox.count_open() == 0, 60)
    assert tries == [1, 2, 3]
    (row,) = stored(database).values()
    assert row.delivered_at is None and row.error.endswith("status 500.")
    assert (counted("given_up"), counted("failed")) == (before[0] + 1, before[1] + 2)


def test_deleted_task_is_dropped(database: Engine) -> None:
    before = counted("dropped")

    def deliver(_delivery: Delivery) -> None:
        raise TaskGone

    add(database, 1)
    with running(database, deliver):
        wait_until(lambda: not stored(database), 60)
    assert counted("dropped") == before + 1


def test_fault_of_ours_is_a_failed_try(database: Engine) -> None:
    tried: list[int] = []

    def deliver(delivery: Delivery) -> None:
        tried.append(delivery.tries)
        if delivery.tries == 1:
            raise KeyError("bug")

    add(database, 1)
    with running(database, deliver, pause_s=lambda _: 0.0) as outbox:
        wait_until(lambda: outbox.count_open() == 0, 60)
    assert tried == [1, 2]


def test_database_that_is_away_for_a_while_ends_nothing(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered: list[str] = []
    away = threading.Event()
    away.set()
    due, failures = Outbox.due, []

    def sometimes(self: Outbox, *given: Any, **more: Any) -> list[Delivery]:
        if away.is_set():
            failures.append(1)
            raise OperationalError("SELECT", {}, Exception("gone"))
        return due(self, *given, **more)

    monkeypatch.setattr(Outbox, "due", sometimes)
    (only,) = add(database, 1)
    with running(database, lambda one: delivered.append(one.task_id)) as outbox:
        wait_until(lambda: len(failures) > 2, 60)
        away.clear()
        wait_until(lambda: outbox.count_open() == 0, 60)
    assert delivered == [only]


def test_two_nodes_share_the_work_and_repeat_none(database: Engine) -> None:
    seen: list[str] = []
    ids = add(database, 60)

    def deliver(delivery: Delivery) -> None:
        seen.append(delivery.task_id)
        time.sleep(0.005)

    with running(database, deliver), running(database, deliver) as outbox:
        wait_until(lambda: outbox.count_open() == 0, 120)
    assert sorted(seen) == sorted(ids)


# --- the slow and the many ------------------------------------------------------------------------


class Slow:
    """Deliveries to ``hosts`` hang until ``release``; counts how many run at once."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = hosts
        self.release = threading.Event()
        self.lock = threading.Lock()
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.done: list[str] = []

    def __call__(self, delivery: Delivery) -> None:
        host = delivery.callback.origin.removeprefix("https://")
        names = host, f"key {delivery.key_id}", "all"
        with self.lock:
            self.running.update(names)
            self.most |= self.running
        if host in self.hosts:
            self.release.wait(60)
        with self.lock:
            self.running.subtract(names)
            self.done.append(delivery.task_id)


def check_passing(
    database: Engine, slow: Slow, quick: list[str], *, held_up: tuple[str, int]
) -> None:
    """The quick ones pass by so many that hang; once these are let go, all are delivered."""
    name, count = held_up
    with running(database, slow, limits=Limits(in_all=6, per_host=2, per_key=4)) as outbox:
        wait_until(lambda: set(quick) <= set(slow.done), 60)
        assert slow.running[name] == count
        slow.release.set()
        wait_until(lambda: outbox.count_open() == 0, 120)


def test_slow_host_holds_up_no_other(database: Engine) -> None:
    slow = Slow("slow.example")
    add(database, 100, host="slow.example")
    quick = add(database, 20, host="quick.example", key="other", due_at=9.0)
    check_passing(database, slow, quick, held_up=("slow.example", 2))
    assert slow.most["slow.example"] <= 2 and slow.most["quick.example"] <= 2


def test_key_with_many_slow_hosts_holds_up_no_other(database: Engine) -> None:
    hosts = [f"h{number}.example" for number in range(20)]
    slow = Slow(*hosts)
    for host in hosts:
        add(database, 3, host=host, key="greedy")
    quick = add(database, 5, host="quick.example", key="modest", due_at=9.0)
    check_passing(database, slow, quick, held_up=("key greedy", 4))
    assert slow.most["key greedy"] <= 4 and slow.most["all"] <= 6


def test_stop_does_not_wait_for_a_receiver_that_hangs(database: Engine) -> None:
    slow = Slow("slow.example")
    add(database, 1, host="slow.example")
    sender = WebhookSender(Outbox(database, hold_s=60.0), slow, poll_s=0.02)
    sender.start()
    wait_until(lambda: slow.running["all"] == 1, 60)
    started = time.monotonic()
    sender.stop(grace_s=0.2)
    assert time.monotonic() - started < 20
    (row,) = stored(database).values()
    assert row.next_at is not None and row.tries == 1  # comes again when the claim runs out
    slow.release.set()
    wait_until(lambda: slow.running["all"] == 0, 60)


def test_log_holds_no_path_and_no_query(
    database: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = Callback("https://a.example/p4th?token=s3cret", "http://test/").stored()
    row = {"task_id": "a", "key_id": "k", "url": hook, "created_at": 1.0, "next_at": 1.0}
    with database.begin() as db:
        db.execute(insert(webhooks), [row])
    with running(database, lambda _: None) as outbox:
        wait_until(lambda: outbox.count_open() == 0, 60)
    written = "".join(capsys.readouterr())
    assert "webhook delivered" in written and "https://a.example" in written
    assert "s3cret" not in written and "p4th" not in written
