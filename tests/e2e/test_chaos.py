"""Nothing that was accepted is lost, whatever is killed; and the checker that says so can fail.

What dies here is a process, at a random moment, by SIGKILL. That a commit also outlives the
machine is the business of ``synchronous=FULL``, which tests/server/test_store.py looks at.
"""

import dataclasses
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Row, select, update

from e2e.history import Download, Poll, TaskHistory, check
from e2e.live import (
    MODEL_PATH,
    LiveServer,
    a_picture,
    children,
    data_uri,
    is_running,
    prediction,
    wait_until,
)
from redux_pipelines.fakes import SLOW_STEP_S
from redux_server import schemas
from redux_server.database import open_database, reader, tasks
from redux_server.store import TaskStore
from redux_server.tasks import NewTask, Outcome, Status, Task

TASKS = 60
CLIENTS = 6
KILLS = 20
CALM_S = 40.0  # within which all must be done once nothing is killed any more
PATIENCE_S = 120.0
IMAGE = data_uri(a_picture())
WAITING = "waiting for the previous worker"


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


class RestartedServer(LiveServer):
    """A server that is killed and comes back; its database can be looked at meanwhile."""

    def __init__(self, data_dir: Path, *flags: str) -> None:
        super().__init__(data_dir, *flags, model="fake-slow")
        self.orphans: list[int] = []

    def stop(self, *, timeout_s: float = 30.0) -> int:
        try:
            return super().stop(timeout_s=timeout_s)
        finally:
            for pid in self.orphans:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def crash(self) -> None:
        """SIGKILL to the API process; its workers live on without it."""
        self.orphans = [pid for pid in self.orphans if is_running(pid)]
        self.orphans += children(self.process.pid)
        self.kill()

    def wait_live(self) -> None:
        """Wait until the API answers, workers or none."""

        def is_live() -> bool:
            with suppress(httpx.TransportError):
                return httpx.get(f"{self.base_url}/livez", timeout=5).status_code == 200
            return False

        wait_until(is_live, 30, what=lambda: self.log)

    def worker(self) -> int:
        """The process id of the one worker, once there is one."""
        wait_until(lambda: bool(self.worker_pids()), 15, what=lambda: self.log)
        return self.worker_pids()[0]

    @contextmanager
    def rows(self) -> Iterator[Callable[[], dict[str, Row[Any]]]]:
        """A function that reads all tasks' rows by id, without ever writing."""
        engine = open_database(self.database_url)
        try:

            def read() -> dict[str, Row[Any]]:
                with reader(engine).connect() as db:
                    return {row.id: row for row in db.execute(select(tasks))}

            yield read
        finally:
            engine.dispose()


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
        "error": "" if status != "failed" else "no",
        "code": 0 if status != "failed" else 1403,
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
    ],
    ids=["completed", "seen only at its end", "failed"],
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
        ("output unusable", history(seen(), downloads=[])),
        ("output unusable", history(seen(), downloads=[Download(OUTPUT, 404, b"")])),
        ("output unusable", history(seen(), downloads=[Download(OUTPUT, 200, PNG[:40])])),
        ("output unusable", history(seen(), downloads=[Download(OUTPUT, 200, b"GIF89a")])),
    ],
)
def test_checker_finds_each_kind_of_broken_promise(kind: str, planted: TaskHistory) -> None:
    assert kind in {anomaly.kind for anomaly in check([planted], bound_s=10)}


def test_checker_finds_an_id_that_was_given_twice() -> None:
    kinds = [anomaly.kind for anomaly in check([history(*GOOD), history(*GOOD)], bound_s=10)]
    assert kinds == ["id given twice"]


# --- a store with a hole, seen by a client -------------------------------------------------------


class Unfenced(TaskStore):
    """Believes whoever comes last."""

    def finish(self, task_id: str, attempt: int, outcome: Outcome) -> bool:
        values = {"status": outcome.status, "outcome": dataclasses.asdict(outcome)}
        with self._engine.begin() as db:
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
    zombie = store.claim("zombie")
    assert zombie is not None
    poll()
    advance(100.0)
    successor = store.claim("successor")
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
    return schemas.prediction(task, base_url="http://x", sign=lambda key, _: f"/files/s/9/{key}")


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


class Client(threading.Thread):
    """Submits, polls and downloads as real clients do, and logs what it sees.

    A poll without an answer is repeated. A submit whose answer was lost is not: nobody can say
    whether there is such a task now. It is counted, and another task is submitted.
    """

    def __init__(self, server: LiveServer, count: int, seed: int) -> None:
        super().__init__(name=f"client-{seed}")
        self.server = server
        self.count = count
        self.random = random.Random(seed)
        self.histories: list[TaskHistory] = []
        self.seen = Counter[str]()
        self.failure: BaseException | None = None
        self.ends_at = time.monotonic() + PATIENCE_S

    def run(self) -> None:
        try:
            with self.server.client() as self.http:
                while len(self.histories) < self.count and time.monotonic() < self.ends_at:
                    self.submit()
                    self.poll_all()
                while any(not h.ends for h in self.histories) and time.monotonic() < self.ends_at:
                    self.poll_all()
                    time.sleep(0.4)
        except BaseException as error:
            self.failure = error

    def submit(self) -> None:
        num_images = self.random.choice([1, 1, 1, 2])
        steps = self.random.choice([2, 5, 5, 10, 10, 20])
        try:
            answer = self.http.post(MODEL_PATH, json=body(steps, num_images=num_images))
        except httpx.ConnectError:
            self.seen["submits refused"] += 1  # certainly not sent
            time.sleep(0.1)
            return
        except httpx.TransportError:
            self.seen["submits without an answer"] += 1
            return
        self.histories.append(TaskHistory(prediction(answer)["id"], num_images))
        time.sleep(self.random.uniform(0, 0.8))

    def poll_all(self) -> None:
        for log in self.histories:
            if not log.ends:
                self.poll(log)

    def poll(self, log: TaskHistory, *, is_final: bool = False) -> None:
        try:
            answer = self.http.get(f"/api/v3/predictions/{log.id}/result")
        except httpx.TransportError:
            self.seen["polls without an answer"] += 1
            assert not is_final, "no answer although nothing was killed"
            time.sleep(0.05)
            return
        self.seen["polls"] += 1
        log.note(answer.status_code, answer.json()["data"] if answer.status_code == 200 else None)

    def look_once_more(self) -> None:
        """After the storm: the end must still be the same, and the outputs be there."""
        with self.server.client() as self.http:
            for log in self.histories:
                self.poll(log, is_final=True)
                for url in (log.ends[-1].prediction or {})["outputs"] if log.ends else ():
                    answer = self.http.get(url)
                    log.downloads.append(Download(url, answer.status_code, answer.content))


class Killer:
    """Kills the API process, its worker or an orphan of a former one, at random moments."""

    def __init__(
        self, server: RestartedServer, has_work: Callable[[float], bool], seed: int
    ) -> None:
        self.server = server
        self.has_work = has_work
        self.random = random.Random(seed)
        self.kills = Counter[str]()

    def run(self, count: int) -> None:
        while self.kills.total() < count:
            # Most of the kills shall hit work that was begun after the last one, some the start.
            killed_at = time.time()
            if self.random.random() < 0.6:
                wait_until(lambda since=killed_at: self.has_work(since), 3.0, must=False)
            time.sleep(self.random.uniform(0.0, 0.6))
            self.kill_one()

    def kill_one(self) -> None:
        workers = self.server.worker_pids()
        orphans = [pid for pid in self.server.orphans if is_running(pid)]
        victims = ["api", *["worker"] * 3 * bool(workers), *["orphan"] * bool(orphans)]
        victim = self.random.choice(victims)
        if victim == "api":
            self.server.crash()
            self.server.start(wait=False)
        else:
            pid = self.random.choice(workers if victim == "worker" else orphans)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kills[victim] += 1


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


def test_no_task_is_lost_under_20_random_kills(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Kills are no fault of the tasks here, so none shall be given up for them.
    server = RestartedServer(tmp_path / "data", "--max-attempts", "50")
    seed = random.SystemRandom().randrange(2**32)
    with server, server.rows() as rows:
        began = time.monotonic()
        clients = [Client(server, TASKS // CLIENTS, seed + n) for n in range(CLIENTS)]
        watch = DeviceWatch(rows)
        for thread in (*clients, watch):
            thread.start()
        try:
            killer = Killer(server, lambda since: _has_work(rows(), since), seed)
            killer.run(KILLS)
            stormed_s = time.monotonic() - began
        finally:
            for client in clients:
                client.join(PATIENCE_S + 30)
            watch.may_end.set()
            watch.join()
        took_s = time.monotonic() - began
        assert [client.failure for client in clients if client.failure] == [], f"seed {seed}"
        wait_until(lambda: not _open(rows()), 20, must=False)
        for client in clients:
            client.look_once_more()
        found = rows()
    histories = [log for client in clients for log in client.histories]
    anomalies = check(histories, bound_s=stormed_s + CALM_S)
    accepted = {log.id for log in histories}
    lost = sorted(accepted - found.keys())
    counts = sum((client.seen for client in clients), Counter[str]())
    with capsys.disabled():
        print(
            f"\nchaos, seed {seed}: {dict(killer.kills)} killed within {stormed_s:.1f} s; "
            f"{len(accepted)} accepted, {len(lost)} lost, {len(anomalies)} anomalies; "
            f"{dict(counts)}, of these {len(found.keys() - accepted)} exist; "
            f"{dict(Counter(row.status for row in found.values()))}, "
            f"{sum(row.attempt - 1 for row in found.values())} attempts repeated; "
            f"longest {max(log.took_s for log in histories):.1f} s, all {took_s:.1f} s"
        )
    assert len(accepted) == TASKS, f"seed {seed}"
    kinds = Counter(anomaly.kind for anomaly in anomalies)
    assert (lost, anomalies) == ([], []), f"{kinds}, seed {seed}\n{server.log[-8000:]}"
    assert _open(found) == [], "a submit without an answer left a task that never ends"
    assert watch.overlaps() == [], f"seed {seed}"
    assert {row.status for row in found.values()} == {"completed"}
    assert sum(row.attempt - 1 for row in found.values()) > 0, "no kill hit any work"


def _open(found: dict[str, Row[Any]]) -> list[str]:
    return [row.id for row in found.values() if not Status(row.status).is_terminal]


def _has_work(found: dict[str, Row[Any]], since: float) -> bool:
    return any(row.lease_until and row.started_at > since for row in found.values())


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
        wait_until(lambda: rows()[long].progress_step > 0, 20)
        server.crash()
        os.kill(orphan, signal.SIGSTOP)  # makes the long task as long as this takes
        server.start(wait=False)
        for _ in range(2):  # whoever waits for the device leaves with its server
            waiting = server.worker()
            wait_until(lambda: WAITING in _readyz(server), 15)
            server.crash()
            wait_until(lambda pid=waiting: not is_running(pid), 3)
            server.start(wait=False)
        wait_until(lambda: WAITING in _readyz(server), 15)
        waiting = server.worker()
        os.kill(waiting, signal.SIGKILL)
        wait_until(lambda: server.worker_pids() not in ([], [waiting]), 15)
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


def _readyz(server: LiveServer) -> str:
    with suppress(httpx.TransportError):
        return httpx.get(f"{server.base_url}/readyz", timeout=5).text
    return ""


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
        wait_until(lambda: rows()[long].progress_step > 0, 20)
        server.crash()
        server.start(wait=False)
        wait_until(lambda: WAITING in _readyz(server), 15)
        began = time.monotonic()
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(15)
        assert time.monotonic() - began < 5
        wait_until(lambda: rows()[long].finished_at is not None, 20)
        assert (rows()[long].status, rows()[long].attempt) == ("completed", 1)
