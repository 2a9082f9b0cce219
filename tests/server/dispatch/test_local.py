"""LocalEngine with a stub for a worker, and which devices get one."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redux_server.database.migration import open_database
from redux_server.dispatch import local as engine_module
from redux_server.dispatch.device import device_lock, lock_path, worker_id
from redux_server.dispatch.local import LocalWorkers, devices, worker_devices
from redux_server.dispatch.presence import (
    EXIT_CANNOT_LOAD,
    EXIT_NOT_YET,
    Presence,
    WorkerState,
)
from redux_server.metrics import WorkerReports
from redux_server.settings import ServerSettings, UsageError
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Status

# Notes its life in the data directory; what it does besides is appended.
STUB = """
import os, sys, time
device = os.environ["FLUX_REDUX_DEVICE"]
notes = open(os.environ["FLUX_REDUX_DATA_DIR"] + "/notes", "a", buffering=1)
def note(what): notes.write(f"{device} {what} {os.getpid()} {time.monotonic()}\\n")
note("started")
"""
WORK = "while os.read(0, 4096): note('woken')\n"
DRAIN = WORK + "time.sleep(0.3)\nnote('drained')\n"
DIE = "sys.exit(7)\n"
STUBBORN = WORK + "note('told')\ntime.sleep(60)\n"


@pytest.fixture
def store(settings: ServerSettings) -> Iterator[TaskStore]:
    database = open_database(settings.database)
    yield TaskStore(database, max_attempts=settings.max_attempts)
    database.dispose()


@contextmanager
def presence_of(settings: ServerSettings) -> Iterator[Presence]:
    database = open_database(settings.database)
    try:
        yield Presence(database)
    finally:
        database.dispose()


class Notes:
    """What the stubs wrote."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notes"

    def all(self, what: str) -> list[tuple[str, int, float]]:
        """(device, process id, monotonic time) of each such note."""
        text = self.path.read_text() if self.path.exists() else ""
        lines = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [(line[0], int(line[2]), float(line[3])) for line in lines if line[1] == what]

    async def wait_for(self, what: str, count: int = 1) -> list[tuple[str, int, float]]:
        await until(lambda: len(self.all(what)) >= count)
        return self.all(what)


async def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, "condition not met in time"
        await asyncio.sleep(0.02)


Scenario = Callable[[LocalWorkers, Notes], Coroutine[Any, Any, None]]


def play(
    settings: ServerSettings, store: TaskStore, stub: str, scenario: Scenario, **options: Any
) -> Notes:
    notes = Notes(settings.data_dir)
    options = {"command": (sys.executable, "-I", "-S", "-c", STUB + stub), **options}
    reports = options.pop("reports", WorkerReports())

    async def run(presence: Presence) -> None:
        workers = LocalWorkers(settings, store, presence, reports, **options)
        await workers.start()
        try:
            await scenario(workers, notes)
        finally:
            await workers.stop()

    with presence_of(settings) as presence:
        asyncio.run(asyncio.wait_for(run(presence), 60))
    return notes


def claimed_task(settings: ServerSettings, store: TaskStore, device: str = "cpu") -> str:
    """A task in the hands of the worker of ``device``."""
    store.accept([NewTask(key_id="k", model="m", input={})], max_open=10)
    (task,) = store.claim(worker_id(settings.data_dir, device))
    return task.id


def is_waiting(store: TaskStore) -> bool:
    return store.queue_state().waiting == 1


def status_of(store: TaskStore, task_id: str) -> Status:
    [task] = store.get([task_id])
    assert task is not None
    return task.status


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("cpu", ["cpu"]),
        ("cuda", ["cuda"]),
        ("cuda:1", ["cuda:1"]),
        ("cuda:0,cuda:1", ["cuda:0", "cuda:1"]),
        (" cuda:0 , cuda:1, ", ["cuda:0", "cuda:1"]),
    ],
)
def test_listed_devices_are_taken_as_they_are(
    setting: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert devices(setting) == expected


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("", ["cpu"]),
        ("-1", ["cpu"]),
        ("0", ["cuda:0"]),
        ("3", ["cuda:0"]),
        ("2,5", ["cuda:0", "cuda:1"]),
        ("GPU-8932f937,GPU-1f2e3d4c", ["cuda:0", "cuda:1"]),
        ("0, ", ["cuda:0"]),
    ],
)
def test_auto_is_every_visible_gpu(
    visible: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices("auto") == expected


@pytest.mark.parametrize(
    ("gpus", "expected"), [(None, ["cpu"]), (0, ["cpu"]), (2, ["cuda:0", "cuda:1"])]
)
def test_auto_without_a_choice_asks_the_driver(
    gpus: int | None, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if gpus is not None:
        (tmp_path / "gpus").mkdir()
        for number in range(gpus):
            (tmp_path / "gpus" / f"0000:0{number}:00.0").mkdir()
    monkeypatch.setattr(engine_module, "Path", lambda _: tmp_path / "gpus")
    assert devices("auto") == expected


@pytest.mark.parametrize(
    ("setting", "parallel", "expected"),
    [
        ("auto", 1, ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4"]),
        ("auto", 2, ["cuda:0,cuda:1", "cuda:2,cuda:3"]),
        ("auto", 4, ["cuda:0,cuda:1,cuda:2,cuda:3"]),
        ("cuda", 2, ["cuda:0,cuda:1"]),
        ("cuda:1", 4, ["cuda:1,cuda:2,cuda:3,cuda:4"]),
        ("cuda:0,cuda:3", 2, ["cuda:0,cuda:3"]),
        ("cuda:3,cuda:1,cuda:0,cuda:2", 2, ["cuda:3,cuda:1", "cuda:0,cuda:2"]),
        ("cpu", 2, ["cpu"]),
    ],
)
def test_gpus_are_dealt_out_to_workers_in_their_order(
    setting: str, parallel: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert worker_devices(setting, parallel) == expected
    for one in expected:  # what a worker is started with means the same to it
        assert worker_devices(one, parallel) == [one]


@pytest.mark.parametrize(
    ("setting", "visible", "reason"),
    [
        ("auto", "", "--parallel 2 needs 2 GPUs for each worker, and --device auto is 0"),
        ("auto", "0", "--device auto is 1"),
        ("cuda:0,cuda:1,cuda:2", "0,1,2", "--device cuda:0,cuda:1,cuda:2 is 3"),
    ],
)
def test_too_few_gpus_for_one_image_are_said(
    setting: str, visible: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UsageError, match=reason):
        worker_devices(setting, 2)


# --- supervision ---------------------------------------------------------------------------------


def test_each_device_has_a_worker_with_the_servers_settings(
    settings: ServerSettings, store: TaskStore
) -> None:
    async def scenario(_engine: LocalWorkers, notes: Notes) -> None:
        started = await notes.wait_for("started", 2)
        assert sorted(device for device, _, _ in started) == ["cpu", "cuda:7"]

    play(replace(settings, device="cpu,cuda:7"), store, WORK, scenario)


def test_wake_reaches_every_worker_and_can_be_repeated(
    settings: ServerSettings, store: TaskStore
) -> None:
    async def scenario(workers: LocalWorkers, notes: Notes) -> None:
        await notes.wait_for("started", 2)
        for _ in range(100):
            workers.wake()
        woken = await notes.wait_for("woken", 2)
        await until(lambda: {device for device, _, _ in notes.all("woken")} == {"cpu", "cuda:7"})
        assert woken

    play(replace(settings, device="cpu,cuda:7"), store, WORK, scenario)


def test_waking_a_worker_that_never_listens_neither_blocks_nor_gathers_memory(
    settings: ServerSettings, store: TaskStore
) -> None:
    async def scenario(workers: LocalWorkers, notes: Notes) -> None:
        await notes.wait_for("started")
        for _ in range(100_000):  # a pipe holds 65,536
            workers.wake()
        [process] = workers._processes.values()
        assert process.stdin is not None
        assert process.stdin.transport.get_write_buffer_size() <= 1
        process.kill()

    play(settings, store, "time.sleep(60)\n", scenario)


def test_a_dead_workers_tasks_wait_again_and_a_new_worker_is_started(
    settings: ServerSettings, store: TaskStore
) -> None:
    claimed_task(settings, store)

    async def scenario(_engine: LocalWorkers, notes: Notes) -> None:
        [(_, pid, _)] = await notes.wait_for("started")
        os.kill(pid, signal.SIGKILL)
        died = time.monotonic()
        await until(lambda: is_waiting(store))
        assert time.monotonic() - died < 5  # not when the lease runs out
        await notes.wait_for("started", 2)

    play(settings, store, WORK, scenario)


def test_a_poison_task_fails_at_its_last_crash(settings: ServerSettings, store: TaskStore) -> None:
    task_id = claimed_task(settings, store)

    async def scenario(_engine: LocalWorkers, notes: Notes) -> None:
        await until(lambda: is_waiting(store))
        store.claim(worker_id(settings.data_dir, "cpu"))
        await until(lambda: status_of(store, task_id) is Status.FAILED)

    play(settings, store, "time.sleep(0.1)\n" + DIE, scenario)


def test_what_a_predecessor_still_works_on_is_left_to_it(
    settings: ServerSettings, store: TaskStore
) -> None:
    claimed_task(settings, store)

    async def scenario(_engine: LocalWorkers, notes: Notes) -> None:
        await notes.wait_for("started", 2)
        assert store.queue_state().running == 1

    with device_lock(lock_path(settings, "cpu"), before_waiting=lambda: None):
        play(settings, store, DIE, scenario)
        assert store.queue_state().running == 1


def test_a_worker_that_keeps_dying_is_restarted_ever_more_slowly(
    settings: ServerSettings, store: TaskStore
) -> None:
    async def scenario(_engine: LocalWorkers, notes: Notes) -> None:
        await notes.wait_for("started", 3)

    times = [at for _, _, at in play(settings, store, DIE, scenario).all("started")]
    assert times[1] - times[0] >= 0.45
    assert times[2] - times[1] >= 0.95


def test_the_pause_has_an_upper_bound(
    settings: ServerSettings, store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_MAX_PAUSE_S", 0.05)

    async def scenario(_engine: LocalWorkers, notes: Notes) -> None:
        await notes.wait_for("started", 8)

    play(settings, store, DIE, scenario)


def test_a_worker_that_lived_long_is_restarted_at_once(
    settings: ServerSettings, store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_HEALTHY_S", 0.0)

    async def scenario(_engine: LocalWorkers, notes: Notes) -> None:
        started = time.monotonic()
        await notes.wait_for("started", 6)
        assert time.monotonic() - started < 10  # with pauses: 0.5 + 1 + 2 + 4 + 8

    play(settings, store, DIE, scenario)


def test_supervision_outlives_a_worker_that_cannot_even_start(
    settings: ServerSettings, store: TaskStore, tmp_path: Path
) -> None:
    program = tmp_path / "not-there-yet"

    async def scenario(_engine: LocalWorkers, notes: Notes) -> None:
        await asyncio.sleep(0.1)
        program.symlink_to(sys.executable)
        await notes.wait_for("started")

    command = (str(program), "-I", "-S", "-c", STUB + WORK)
    play(settings, store, "", scenario, command=command)


def test_supervision_outlives_a_database_that_is_away(
    settings: ServerSettings, store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(store, "release", fail)

    async def scenario(_engine: LocalWorkers, notes: Notes) -> None:
        await notes.wait_for("started", 2)

    play(settings, store, DIE, scenario)


# --- a model that cannot be loaded ----------------------------------------------------------------

HOPELESS = f"sys.exit({EXIT_CANNOT_LOAD})\n"
NOT_YET = f"sys.exit({EXIT_NOT_YET})\n"
REASON = "the hub cannot be reached"


def test_a_server_whose_workers_can_never_load_has_failed(
    settings: ServerSettings, store: TaskStore
) -> None:
    async def scenario(workers: LocalWorkers, notes: Notes) -> None:
        assert workers.failure == ""
        await until(lambda: workers.failure != "")
        assert workers.failure == "starting"  # the last that was said, and the stub says nothing

    play(settings, store, HOPELESS, scenario)


def test_one_device_that_works_is_enough(settings: ServerSettings, store: TaskStore) -> None:
    stub = f"if device != 'cpu': {HOPELESS}" + WORK

    async def scenario(workers: LocalWorkers, notes: Notes) -> None:
        await until(lambda: len([1 for each in notes.all("started") if each[0] != "cpu"]) >= 2)
        assert workers.failure == ""

    play(replace(settings, device="cpu,cuda:7"), store, stub, scenario)


def test_what_may_load_later_is_tried_again_and_stays_failed_meanwhile(
    settings: ServerSettings, store: TaskStore, capsys: pytest.CaptureFixture[str]
) -> None:
    name = worker_id(settings.data_dir, "cpu")
    stub = (
        "import sqlite3\n"
        "db = sqlite3.connect(os.environ['FLUX_REDUX_DATA_DIR'] + '/tasks.db', timeout=10)\n"
        f"db.execute(\"UPDATE workers SET state = 'failed', detail = '{REASON}'\")\n"
        "db.commit(); note('failed')\n" + NOT_YET
    )
    states: set[WorkerState] = set()

    async def scenario(workers: LocalWorkers, notes: Notes) -> None:
        await notes.wait_for("failed")
        while len(notes.all("failed")) < 3:
            states.update(each.state for each in presence.all() if each.id == name)
            await asyncio.sleep(0.02)
        assert workers.failure == ""

    with presence_of(settings) as presence:
        play(settings, store, stub, scenario)
    assert states == {WorkerState.FAILED}
    assert capsys.readouterr().out.count(REASON) == 1, "said once, not at each try"


# --- the end -------------------------------------------------------------------------------------


def test_stop_waits_for_workers_to_finish(settings: ServerSettings, store: TaskStore) -> None:
    async def scenario(_engine: LocalWorkers, notes: Notes) -> None:
        await notes.wait_for("started", 2)

    notes = play(replace(settings, device="cpu,cuda:7"), store, DRAIN, scenario)
    assert len(notes.all("drained")) == 2
    assert len(notes.all("started")) == 2  # and none is restarted


def test_stop_kills_a_late_worker_and_puts_its_task_under_no_suspicion(
    settings: ServerSettings, store: TaskStore
) -> None:
    task_id = claimed_task(settings, store)
    store.release(worker_id(settings.data_dir, "cpu"))
    store.claim(worker_id(settings.data_dir, "cpu"))  # its last attempt

    async def scenario(workers: LocalWorkers, notes: Notes) -> None:
        [(_, pid, _)] = await notes.wait_for("started")
        began = time.monotonic()
        await workers.stop()
        assert 0.25 < time.monotonic() - began < 10
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert len(notes.all("told")) == 1

    play(replace(settings, drain_timeout_s=0.3), store, STUBBORN, scenario)
    assert is_waiting(store)
    assert status_of(store, task_id) is Status.PROCESSING


def test_stop_does_not_wait_for_the_next_restart(
    settings: ServerSettings, store: TaskStore
) -> None:
    async def scenario(workers: LocalWorkers, notes: Notes) -> None:
        await notes.wait_for("started", 3)
        await asyncio.sleep(0.3)  # it is dead by now, and the pause is 2 s
        began = time.monotonic()
        await workers.stop()
        assert time.monotonic() - began < 1

    assert len(play(settings, store, DIE, scenario).all("started")) == 3


def test_a_dead_worker_does_not_stay_ready(settings: ServerSettings, store: TaskStore) -> None:
    seen = []

    async def scenario(workers: LocalWorkers, notes: Notes) -> None:
        while len(notes.all("started")) < 2:
            await asyncio.sleep(0.05)
        seen.extend(presence.all())

    name = worker_id(settings.data_dir, "cpu")
    with presence_of(settings) as presence:
        presence.announce(name, "cpu", WorkerState.READY, "said before it was killed")
        play(settings, store, DIE, scenario)
        assert [worker.state for worker in seen] == [WorkerState.LOADING]
        assert presence.all() == []  # and a stopped server has none


REPORT = """
import json
for hits in (1, 4):
    print(json.dumps([["flux_redux_cache_hits_total", {"cache": "x"}, hits]]), flush=True)
"""


def test_what_workers_report_is_kept_when_they_end(
    settings: ServerSettings, store: TaskStore
) -> None:
    reports = WorkerReports()

    def total() -> float:
        return sum(reports.total().values())

    async def scenario(_: LocalWorkers, notes: Notes) -> None:
        await notes.wait_for("started", 2)  # one has died
        await until(lambda: total() >= 8)

    odd = "print('Loading weights ...', flush=True)\n" + REPORT
    play(settings, store, odd + DIE, scenario, reports=reports)
    assert total() % 4 == 0
    assert reports._latest == {}


def test_a_second_server_leaves_the_firsts_worker_as_it_is(
    settings: ServerSettings, store: TaskStore
) -> None:
    """It has the same name, for it has the same device and data directory."""
    seen: list[WorkerState] = []

    async def scenario(_: LocalWorkers, notes: Notes) -> None:
        await notes.wait_for("started", 2)
        seen.extend(worker.state for worker in presence.all())

    name, path = worker_id(settings.data_dir, "cpu"), lock_path(settings, "cpu")
    with (
        presence_of(settings) as presence,
        device_lock(path, before_waiting=lambda: pytest.fail("it was free")),
    ):
        presence.announce(name, "cpu", WorkerState.READY, "of the first")
        play(settings, store, DIE, scenario)
        assert seen == [WorkerState.READY]
        assert [each.detail for each in presence.all()] == ["of the first"]


def test_stop_before_start_and_twice_is_harmless(
    settings: ServerSettings, store: TaskStore
) -> None:
    async def run(presence: Presence) -> None:
        workers = LocalWorkers(settings, store, presence, WorkerReports())
        workers.wake()
        await workers.stop()
        await workers.stop()

    with presence_of(settings) as presence:
        asyncio.run(run(presence))
