"""Nothing that was accepted is lost, whatever is killed; and the checker that says so can fail.

What dies here is a process, at a random moment, by SIGKILL. That a commit also outlives the
machine is the business of ``synchronous=FULL``, which tests/server/tasks/test_store.py looks at.
"""

import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Row, update

from chaos.clients import Habits
from chaos.run import scenario
from chaos.storm import Goal, Storm, overtaken
from e2e.history import Download, Poll, TaskHistory, check
from e2e.live import (
    MODEL_PATH,
    a_picture,
    data_uri,
    is_running,
    prediction,
    wait_until,
)
from e2e.restarted import RestartedServer
from redux_pipelines.fake import SLOW_STEP_S
from redux_server.api import prediction as prediction_module
from redux_server.database.migration import open_database
from redux_server.database.tables import tasks
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Outcome, Status, Task

QUICK = Habits(most_open=10, refused_webhooks=0.0)
TASKS, KILLS = 300, 10
IMAGE = data_uri(a_picture())
WAITING = "another worker has this device"  # in the log of whoever waits for its end


def body(steps: int, *, num_images: int = 1, **more: Any) -> dict[str, Any]:
    """A request that takes ``steps`` * ``num_images`` * 20 ms on ``fake-slow``."""
    return {
        "image": IMAGE,
        "size": "512*512",
        "num_inference_steps": steps,
        "num_images": num_images,
        "enable_safety_checker": False,
        **more,
    }


# --- the checker ---------------------------------------------------------------------------------

PNG = a_picture()
TASK_ID = "0" * 32
OUTPUT = f"http://x/files/sig/9/{TASK_ID}/1/0.png"


def seen(status: str = "completed", **more: Any) -> dict[str, Any]:
    """A prediction as a client sees it."""
    is_good = status == "completed"
    return {
        "id": TASK_ID,
        "model": "m",
        "input": {},
        "created_at": "2026-01-01T00:00:00.000Z",
        "urls": {"get": "http://x"},
        "status": status,
        "outputs": [OUTPUT] if is_good else [],
        "error": "no" if status in ("failed", "cancelled") else "",
        "code": 1403 if status in ("failed", "cancelled") else 0,
        **more,
    }


def history(*predictions: dict[str, Any], **more: Any) -> TaskHistory:
    """A client's log with these answers, a second apart."""
    polls = [Poll(1.0 + n, 200, answer) for n, answer in enumerate(predictions)]
    fields = {"downloads": [Download(OUTPUT, 200, PNG)], "polls": polls, **more}
    return TaskHistory(TASK_ID, num_images=1, accepted_at=0.0, **fields)


GOOD = (seen("created"), seen("processing"), seen("processing"), seen(), seen())
SECOND = f"http://x/files/sig/9/{TASK_ID}/2/1.png"


@pytest.mark.parametrize(
    "planted",
    [
        history(*GOOD),
        history(seen()),
        history(seen("created"), seen("failed"), seen("failed"), downloads=[]),
        history(seen("created"), seen("cancelled"), cancelled_at=0.5, downloads=[]),
        history(polls=[Poll(1, 200, seen("created")), Poll(3, 404, None)], deleted_at=2.0),
        history(*GOOD, has_webhook=True, told=[seen(), seen()]),
        history(seen("cancelled"), cancelled_at=0.5, has_webhook=True, downloads=[]),
    ],
    ids=["completed", "seen at its end", "failed", "cancelled", "deleted", "told", "not told"],
)
def test_checker_is_content_with_a_good_history(planted: TaskHistory) -> None:
    assert check([planted], bound_s=10) == []


@pytest.mark.parametrize(
    ("kind", "planted"),
    [
        ("lost", history(*GOOD, polls=[Poll(1, 404, None), Poll(2, 200, seen())])),
        ("error answer", history(polls=[Poll(1, 500, None), Poll(2, 200, seen())])),
        ("unknown state", history(seen("melting"), seen())),
        ("never ended", history(seen("created"), seen("processing"))),
        ("never ended", history()),
        ("late", history(*[seen("processing")] * 10, seen())),
        ("state went back", history(seen("processing"), seen("created"), seen())),
        ("state went back", history(seen(), seen("processing"), seen())),
        ("end changed", history(seen(), seen("failed", outputs=[OUTPUT]))),
        ("end changed", history(seen(), seen(seeds=[2]))),
        ("fixed field changed", history(seen("created", model="other"), seen())),
        ("failed task with outputs", history(seen("failed", outputs=[OUTPUT]))),
        ("failed task without a reason", history(seen("failed", error=""))),
        ("wrong number of outputs", history(seen(outputs=[]))),
        ("outputs of several attempts", history(seen(outputs=[OUTPUT, SECOND]))),
        ("outputs of several attempts", history(seen(outputs=[OUTPUT.replace("0" * 32, "f")]))),
        ("cancelled unasked", history(seen("cancelled"))),
        ("came back after its deletion", history(*GOOD, deleted_at=1.5)),
        ("lost", history(polls=[Poll(1, 404, None)], deleted_at=2.0)),
        ("ended otherwise", history(seen(), ends_as="failed")),
        ("never told", history(seen(), has_webhook=True)),
        ("told unasked", history(seen(), told=[seen()])),
        ("told another end", history(seen(), has_webhook=True, told=[seen(), seen("failed")])),
        ("output unusable", history(seen(), downloads=[])),
        ("output unusable", history(seen(), downloads=[Download(OUTPUT, 404, b"")])),
        ("output unusable", history(seen(), downloads=[Download(OUTPUT, 200, PNG[:40])])),
        ("output unusable", history(seen(), downloads=[Download(OUTPUT, 200, b"GIF89a")])),
    ],
)
def test_checker_finds_each_kind_of_broken_promise(kind: str, planted: TaskHistory) -> None:
    assert kind in {anomaly.kind for anomaly in check([planted], bound_s=10)}


def test_checker_finds_two_tasks_of_one_idempotency_key() -> None:
    one, two = history(*GOOD, idempotency_key="k"), history(*GOOD, idempotency_key="k")
    assert check([one, two], bound_s=10) == []
    two.id = "1" * 32
    kinds = {anomaly.kind for anomaly in check([one, two], bound_s=10)}
    assert "two tasks of one idempotency key" in kinds


def test_checker_finds_an_id_that_was_given_twice() -> None:
    kinds = [anomaly.kind for anomaly in check([history(*GOOD), history(*GOOD)], bound_s=10)]
    assert kinds == ["id given twice"]


def test_a_task_is_stuck_when_younger_ones_pass_it_by_not_when_all_is_slow() -> None:
    def task(accepted_at: float, ended_at: float) -> TaskHistory:
        unanswered = Poll(ended_at, 503, None)
        polls = [Poll(ended_at, 200, seen("created")), unanswered, Poll(ended_at + 90, 200, seen())]
        log = history(polls=polls)
        log.accepted_at = accepted_at
        return log

    slow = [task(0, 100), task(1, 110), task(2, 120)]
    assert [late_s for _, late_s in overtaken(slow)] == [0, 0, 0]
    forgotten = [task(0, 200), task(1, 5), task(30, 31)]
    assert [late_s for _, late_s in overtaken(forgotten)] == [0, 0, 105]


# --- a store with a hole, seen by a client -------------------------------------------------------


class Unfenced(TaskStore):
    """Believes whoever comes last."""

    def finish(self, task_id: str, attempt: int, outcome: Outcome) -> bool:
        values = {"status": outcome.status, "outcome": dataclasses.asdict(outcome)}
        with self._database.begin() as db:
            db.execute(update(tasks).where(tasks.c.id == task_id).values(**values))
        return True


class Forgetful(TaskStore):
    """Leaves a dead worker's task with it for good."""

    def _take_back(self, *_: Any, **__: Any) -> int:
        return 0


def watch_a_zombie(store: TaskStore, advance: Callable[[float], None]) -> TaskHistory:
    """A worker freezes, loses its task to another and then brings its own result."""
    new = NewTask("k", "m", {"num_inference_steps": 1, "num_images": 1, "image": "blob:x"})
    store.accept([new], max_open=1)
    log = TaskHistory(new.id, num_images=1)

    def poll() -> None:
        [task] = store.get([new.id])
        assert task is not None
        log.note(200, _as_client(task))

    poll()
    (zombie,) = store.claim("zombie")
    poll()
    advance(100.0)
    successor = next(iter(store.claim("successor")), None)
    for task in (successor, zombie):
        if task is not None and (successor or task is not zombie):
            store.finish(task.id, task.attempt, _completed(task))
            poll()
    log.downloads += [
        Download(url, 200, PNG) for end in log.ends for url in (end.prediction or {})["outputs"]
    ]
    return log


def _completed(task: Task) -> Outcome:
    return Outcome(status=Status.COMPLETED, outputs=[f"{task.id}/{task.attempt}/0.png"], seeds=[1])


def _as_client(task: Task) -> dict[str, Any]:
    return prediction_module.prediction(
        task, base_url="http://x", sign=lambda key, _: f"/files/s/9/{key}"
    )


@pytest.mark.parametrize(
    ("store_class", "kinds"),
    [(TaskStore, []), (Unfenced, ["end changed"]), (Forgetful, ["never ended"])],
)
def test_a_hole_in_the_store_shows_in_its_clients_history(
    store_class: type[TaskStore], kinds: list[str], tmp_path: Path
) -> None:
    now = [1000.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    engine = open_database(f"sqlite:///{tmp_path / 'tasks.db'}")
    try:
        log = watch_a_zombie(store_class(engine, clock=lambda: now[0]), advance)
    finally:
        engine.dispose()
    assert [anomaly.kind for anomaly in check([log], bound_s=10)] == kinds


# --- kill -9, at random --------------------------------------------------------------------------


class DeviceWatch(threading.Thread):
    """Looks which attempts make progress: on one device two must never do so by turns."""

    def __init__(self, rows: Callable[[], dict[str, Row[Any]]]) -> None:
        super().__init__(name="device-watch")
        self.read = rows
        self.may_end = threading.Event()
        self.advances: list[set[tuple[str, int]]] = []

    def run(self) -> None:
        before: dict[tuple[str, int], int] = {}
        while not self.may_end.wait(0.05):
            now = {(row.id, row.attempt): row.progress_step for row in self.read().values()}
            self.advances.append({key for key, step in now.items() if step > before.get(key, 0)})
            before = {key: max(step, before.get(key, 0)) for key, step in now.items()}

    def overlaps(self) -> list[tuple[Any, Any]]:
        return overlaps(self.advances)


def overlaps(advances: list[set[tuple[str, int]]]) -> list[tuple[Any, Any]]:
    """Pairs of attempts of which one advanced between two advances of the other."""
    spans: dict[tuple[str, int], list[int]] = {}
    for at, keys in enumerate(advances):
        for key in keys:
            spans.setdefault(key, []).append(at)
    return [
        (one, other)
        for one, moments in spans.items()
        for other, others in spans.items()
        if one != other and any(moments[0] < at < moments[-1] for at in others)
    ]


def test_device_watch_tells_turns_from_a_sequence() -> None:
    one, two = ("a", 1), ("b", 1)
    assert overlaps([{one}, {one}, {one, two}, {two}]) == []
    assert overlaps([{one}, {two}, {one}]) == [(one, two)]


def test_no_task_is_lost_under_random_kills(capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(2**16)
    with scenario("local", seed) as server:
        watch = DeviceWatch(server.rows)
        watch.start()
        try:
            faults = [fault for fault in server.faults() if fault.kills]
            found = Storm(server, faults, seed, habits=QUICK).run(Goal(TASKS, strikes=KILLS))
        finally:
            watch.may_end.set()
            watch.join()
        log = server.log
    with capsys.disabled():
        print(f"\n{found.report()}")
    assert found.is_good, log
    assert (found.accepted >= TASKS, found.kills) == (True, KILLS)
    assert watch.overlaps() == [], f"seed {seed}"
    assert found.attempts_repeated > 0, "no kill hit any work"


# --- kill -9, at chosen moments ------------------------------------------------------------------


def test_an_acknowledged_task_outlives_the_api_process(tmp_path: Path) -> None:
    server = RestartedServer(tmp_path / "data")
    acknowledged = []
    with server:
        for _ in range(6):
            with server.client() as client:
                answer = client.post(MODEL_PATH, json=body(2))
                server.crash()
            acknowledged.append(prediction(answer)["id"])
            server.start(wait=False)
            server.wait_live()
            assert server.get(acknowledged[-1])["status"] in ("created", "processing", "completed")
        ended = [server.wait(task_id) for task_id in acknowledged]
    assert [task["status"] for task in ended] == ["completed"] * 6


def test_an_orphaned_worker_finishes_its_task_and_its_successors_wait(tmp_path: Path) -> None:
    server = RestartedServer(tmp_path / "data")
    with server, server.rows() as rows:
        orphan = server.worker()
        long = server.submit(body(50, num_images=4))["id"]
        wait_until(lambda: rows()[long].progress_step > 0, 60)
        server.crash()
        server.freeze(orphan)  # makes the long task as long as this takes
        server.start(wait=False)
        for round_ in (1, 2):  # whoever waits for the device leaves with its server
            waiting = server.worker()
            wait_until(lambda round_=round_: server.log.count(WAITING) == round_, 60)
            server.crash()
            wait_until(lambda pid=waiting: not is_running(pid), 3)
            server.start(wait=False)
        wait_until(lambda: server.log.count(WAITING) == 3, 60)
        waiting = server.worker()
        os.kill(waiting, signal.SIGKILL)
        wait_until(lambda: server.worker_pids() not in ([], [waiting]), 60)
        assert rows()[long].lease_until is not None  # the dead one took nothing from the orphan
        os.kill(orphan, signal.SIGCONT)
        time.sleep(0.3)  # now it knows that its server is gone, and claims nothing more
        short = server.submit(body(1))["id"]
        assert server.wait(long)["status"] == server.wait(short)["status"] == "completed"
        wait_until(lambda: not is_running(orphan), 5)
        found = rows()
    assert (found[long].attempt, found[short].attempt) == (1, 1)
    assert found[long].finished_at - found[long].started_at >= 200 * SLOW_STEP_S
    assert found[short].started_at >= found[long].finished_at


def test_a_task_that_kills_its_worker_is_given_up_and_its_neighbours_complete(
    tmp_path: Path,
) -> None:
    server = RestartedServer(tmp_path / "data", "--max-attempts", "3")
    with server, server.rows() as rows:
        before = [server.submit(body(30))["id"] for _ in range(2)]
        poison = server.submit(body(50, num_images=4))["id"]
        after = [server.submit(body(5))["id"] for _ in range(4)]
        for attempt in (1, 2, 3):
            wait_until(
                lambda attempt=attempt: (
                    rows()[poison].attempt == attempt and rows()[poison].progress_step > 0
                ),
                30,
                what=lambda: server.log,
            )
            os.kill(server.worker(), signal.SIGKILL)
        killed = time.monotonic()
        ended = server.wait(poison)
        neighbours = [server.wait(task_id) for task_id in (*before, *after)]
        back_s = time.monotonic() - killed
    assert (ended["status"], ended["code"], ended["outputs"]) == ("failed", 5000, [])
    assert ended["error"] == "The worker stopped unexpectedly 3 times during this task."
    assert [task["status"] for task in neighbours] == ["completed"] * 6
    assert back_s < 15


def test_a_server_stops_at_once_while_its_worker_waits_for_an_orphan(tmp_path: Path) -> None:
    server = RestartedServer(tmp_path / "data")
    with server, server.rows() as rows:
        long = server.submit(body(50, num_images=4))["id"]
        wait_until(lambda: rows()[long].progress_step > 0, 60)
        (orphan,) = server.worker_pids()
        server.crash()
        server.freeze(orphan)  # or it may be done before the next worker is there
        server.start(wait=False)
        wait_until(lambda: WAITING in server.log, 60)
        began = time.monotonic()
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(15)
        assert time.monotonic() - began < 5
        os.kill(orphan, signal.SIGCONT)
        wait_until(lambda: rows()[long].finished_at is not None, 20)
        assert (rows()[long].status, rows()[long].attempt) == ("completed", 1)
