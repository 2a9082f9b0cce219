"""A full disk: no task is accepted that could not be ended, and none that was is lost."""

import errno
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert
from sqlalchemy.exc import OperationalError

from e2e.live import a_picture, data_uri
from redux_pipelines.fake import FakePipeline
from redux_server.api import housekeeping
from redux_server.api.services import Services
from redux_server.database.migration import open_database
from redux_server.database.tables import secrets
from redux_server.storage.blobs import Blobs, StorageError
from redux_server.storage.disk import Ballast, DiskSpace, is_full
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Created, NewTask, Outcome, Status
from redux_server.worker.batch import BatchRunner
from redux_server.worker.leased import MAX_STARTS, EndRecorder, LeasedTask
from redux_server.worker.loop import Worker
from server.in_process import Api
from server.worker_bench import INPUT, ME, OTHER, Images, Safety

MIB = 2**20
SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 12 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small file system here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(folder: Path, *, leave_bytes: int = 0) -> Path:
    """Use up the disk; returns the file that does."""
    path = folder / "other-peoples-file"
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                free = os.statvfs(folder)
                room = free.f_bavail * free.f_frsize - leave_bytes
                if room <= 0:
                    return path
                file.write(os.urandom(min(room, MIB)))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return path


# --- the floor ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free_mib", "is_refused"), [(600, False), (512, False), (511, True), (0, True)]
)
def test_below_the_floor_a_submit_is_refused_before_anything_is_written(
    build_services: Callable[..., Services],
    build_api: Callable[..., Api],
    free_mib: int,
    is_refused: bool,
) -> None:
    services = build_services()
    disk = DiskSpace([Path("/x")], floor_bytes=512 * MIB, free=lambda _: free_mib * MIB)
    api = build_api(replace(services, disk=disk))
    answer = api.post(SUBMIT, json={"image": data_uri(a_picture())})
    written = services.blobs.tasks_before(time.time() + 60)
    if is_refused:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert f"{free_mib} MiB free" in answer.json()["message"]
        assert services.store.queue_state().waiting == 0
        assert written == set()
    else:
        assert answer.status_code == 200
        assert written == {answer.json()["data"]["id"]}


def test_below_the_floor_what_was_accepted_goes_on(
    build_services: Callable[..., Services], build_api: Callable[..., Api]
) -> None:
    services, free = build_services(), [600 * MIB]
    disk = DiskSpace([Path("/x")], floor_bytes=512 * MIB, free=lambda _: free[0])
    api = build_api(replace(services, disk=disk))
    task_id = api.post(SUBMIT, json={"image": data_uri(a_picture())}).json()["data"]["id"]
    free[0] = 5 * MIB
    assert api.post(SUBMIT, json={"image": data_uri(a_picture())}).status_code == 503
    readyz = api.get("/readyz").json()
    assert "5 MiB free" in readyz["refuses_tasks"]
    gauges = housekeeping.own_gauges(api.services, is_database_up=True)
    read = {name: value for (name, _), value in gauges.items()}
    assert read["disk_free_bytes"] == 5 * MIB
    services.blobs.put(f"{task_id}/1/0.png", a_picture())
    assert services.store.claim(ME) != []
    done = Outcome(Status.COMPLETED, outputs=[f"{task_id}/1/0.png"], has_nsfw_contents=[False])
    assert services.store.finish(task_id, 1, done)
    data = api.get(f"/api/v3/predictions/{task_id}/result").json()["data"]
    assert data["status"] == "completed"
    assert api.get(data["outputs"][0], key="").content == a_picture()
    free[0] = 600 * MIB
    assert api.post(SUBMIT, json={"image": data_uri(a_picture())}).status_code == 200
    assert "refuses_tasks" not in api.get("/readyz").json()


def test_the_fullest_of_several_disks_counts() -> None:
    free = {Path("/data"): 900 * MIB, Path("/pictures"): 100 * MIB}
    disk = DiskSpace(free, floor_bytes=512 * MIB, free=free.__getitem__)
    assert disk.free_bytes() == 100 * MIB
    assert disk.complaint() is not None


def test_floor_of_zero_is_none() -> None:
    assert DiskSpace([Path("/x")], floor_bytes=0, free=lambda _: 0).complaint() is None


# --- the ballast ----------------------------------------------------------------------------------


def test_ballast_really_holds_its_size(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "ballast", 4 * MIB)
    assert ballast.hold()
    stat = (tmp_path / "ballast").stat()
    assert stat.st_size == 4 * MIB
    assert stat.st_blocks * 512 >= 4 * MIB, "a sparse file holds nothing"
    assert not ballast.hold(), "made twice"
    assert ballast.release()
    assert not ballast.release()
    assert list(tmp_path.iterdir()) == []


def test_ballast_of_size_zero_is_never_made(tmp_path: Path) -> None:
    assert not Ballast(tmp_path / "ballast", 0).hold()
    assert list(tmp_path.iterdir()) == []


def test_ballast_is_made_only_where_as_much_again_stays_free(small_disk: Path) -> None:
    ballast = Ballast(small_disk / "ballast", 4 * MIB)
    others = fill(small_disk, leave_bytes=7 * MIB)
    assert not ballast.hold()
    assert list(small_disk.iterdir()) == [others]
    others.unlink()
    assert ballast.hold()


def test_api_keeps_a_ballast_on_board(
    build_services: Callable[..., Services], build_api: Callable[..., Api]
) -> None:
    services = build_services(min_free_disk=1)
    api = build_api(services)
    path = services.settings.ballast_path
    ends_at = time.monotonic() + 20
    while not path.exists() and time.monotonic() < ends_at:
        api.get("/livez")
    assert path.stat().st_blocks * 512 >= 16 * MIB


def test_only_a_full_disk_costs_the_ballast(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "ballast", MIB)
    ballast.hold()

    def locked() -> bool:
        raise OperationalError("UPDATE", {}, Exception("database is locked"))

    with pytest.raises(OperationalError):
        ballast.make_room_for(locked)
    assert (tmp_path / "ballast").exists()


def test_a_change_that_stays_impossible_is_tried_twice_and_raised(tmp_path: Path) -> None:
    ballast, tries = Ballast(tmp_path / "ballast", MIB), []
    ballast.hold()

    def full() -> bool:
        tries.append((tmp_path / "ballast").exists())
        raise OperationalError("UPDATE", {}, Exception("database or disk is full"))

    with pytest.raises(OperationalError):
        ballast.make_room_for(full)
    assert tries == [True, False]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (StorageError("the endpoint does not answer"), False),
        (OperationalError("x", {}, Exception("database or disk is full")), True),
        (OperationalError("x", {}, Exception("database is locked")), False),
    ],
)
def test_a_full_disk_is_told_from_other_troubles(error: Exception, expected: bool) -> None:
    assert is_full(error) is expected


# --- pictures on a full disk ----------------------------------------------------------------------


def test_full_disk_is_an_out_of_space_error_and_leaves_no_half_picture(small_disk: Path) -> None:
    blobs = Blobs(small_disk / "blobs")
    blobs.put("a/1/0.png", b"whole")
    fill(small_disk, leave_bytes=MIB)
    with pytest.raises(StorageError) as caught:
        blobs.put("b/1/0.png", os.urandom(3 * MIB))
    assert is_full(caught.value)
    with pytest.raises(FileNotFoundError):
        blobs.get("b/1/0.png")
    assert blobs.get("a/1/0.png") == b"whole"


def test_pictures_leave_the_last_room_to_the_database(small_disk: Path) -> None:
    blobs = Blobs(small_disk / "blobs", keep_free_bytes=4 * MIB)
    blobs.put("a/1/0.png", os.urandom(MIB))
    with pytest.raises(StorageError) as caught:
        blobs.put("b/1/0.png", os.urandom(8 * MIB))
    assert is_full(caught.value)
    assert blobs.tasks_before(time.time() + 60) == {"a"}


# --- a worker on a full disk ----------------------------------------------------------------------


class Shelf:
    """A folder of pictures that refuses as often as it is told."""

    def __init__(self, blobs: Blobs, failures: int = 0) -> None:
        self._blobs = blobs
        self.failures_left = failures
        self.puts: list[str] = []

    def put(self, key: str, data: bytes) -> None:
        self.puts.append(key)
        if self.failures_left:
            self.failures_left -= 1
            raise StorageError(errno.ENOSPC, "No space left on device")
        self._blobs.put(key, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redux_server.worker.outputs._PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr("redux_server.worker.outputs.PROBE_EVERY_S", 0.01)


def submit(store: TaskStore, count: int = 1) -> list[str]:
    tasks = store.accept([NewTask("key", "model", INPUT) for _ in range(count)], max_open=1000)
    return [each.task.id for each in tasks if isinstance(each, Created)]


def worker_on(store: TaskStore, blobs: Any, **parts: Any) -> Worker:
    given: dict[str, Any] = {"pipeline": FakePipeline(), "safety": Safety(), "images": Images()}
    given |= parts
    ballast = given.pop("ballast", None)
    return Worker(ME, store=store, ballast=ballast, maker=BatchRunner(blobs=blobs, **given))


@pytest.mark.usefixtures("no_pauses")
def test_short_shortage_is_waited_out_without_making_the_image_again(
    database: Engine, tmp_path: Path
) -> None:
    store, shelf = TaskStore(database), Shelf(Blobs(tmp_path / "blobs"), failures=3)
    (task_id,) = submit(store)
    assert worker_on(store, shelf).step()
    (task,) = store.get([task_id])
    assert task is not None
    assert (task.status, task.attempt) == (Status.COMPLETED, 1)
    assert shelf.puts == [f"{task_id}/1/0.png"] * 4


@pytest.mark.usefixtures("no_pauses")
def test_task_whose_images_find_no_room_comes_back_later(
    database: Engine, tmp_path: Path, clock: Any
) -> None:
    store, shelf = TaskStore(database, clock=clock), Shelf(Blobs(tmp_path / "blobs"), failures=4)
    (task_id,) = submit(store)
    worker = worker_on(store, shelf)
    assert worker.step()
    (task,) = store.get([task_id])
    assert task is not None
    assert (task.status, task.crashes, task.outcome) == (Status.PROCESSING, 0, None)
    assert store.claim(OTHER) == [], "too early"
    clock.now += 5.5
    assert worker.step()
    (task,) = store.get([task_id])
    assert task is not None
    assert (task.status, task.attempt) == (Status.COMPLETED, 2)


@pytest.mark.usefixtures("no_pauses")
def test_nothing_is_begun_while_its_images_would_have_no_room(
    database: Engine, tmp_path: Path, clock: Any
) -> None:
    store, shelf = TaskStore(database, clock=clock), Shelf(Blobs(tmp_path / "blobs"), failures=7)
    first, second = submit(store, 2)
    worker = worker_on(store, shelf)
    assert worker.step()  # four tries for an image
    assert worker.step()  # three probes, the fourth gets through
    probes = [key for key in shelf.puts if key.startswith("probe/")]
    assert len(probes) == 4
    states = [task.status for task in store.get([first, second]) if task is not None]
    assert states == [Status.PROCESSING, Status.COMPLETED]
    assert shelf._blobs.tasks_before(time.time() + 60) == {second}, "a probe was left behind"


@pytest.mark.usefixtures("no_pauses")
def test_task_is_given_up_after_many_starts(database: Engine, tmp_path: Path, clock: Any) -> None:
    store = TaskStore(database, clock=clock)
    (task_id,) = submit(store)
    for _ in range(MAX_STARTS - 1):
        (held,) = store.claim(OTHER)
        assert store.give_back(task_id, held.attempt)
    shelf = Shelf(Blobs(tmp_path / "blobs"), failures=4)
    assert worker_on(store, shelf).step()
    (task,) = store.get([task_id])
    assert task is not None and task.outcome is not None
    assert (task.status, task.outcome.code) == (Status.FAILED, 5000)
    assert f"{MAX_STARTS} attempts" in task.outcome.error


def test_give_back_is_fenced(database: Engine, clock: Any) -> None:
    store = TaskStore(database, clock=clock)
    (task_id,) = submit(store)
    store.claim(ME)
    assert not store.give_back(task_id, 2, delay_s=5)
    assert store.give_back(task_id, 1, delay_s=5)
    assert not store.give_back(task_id, 1, delay_s=5)


# --- all of it, on a real disk --------------------------------------------------------------------


@pytest.mark.usefixtures("no_pauses")
def test_disk_that_fills_up_loses_no_task_and_records_what_is_finished(small_disk: Path) -> None:
    database = open_database(f"sqlite:///{small_disk / 'tasks.db'}")
    ballast = Ballast(small_disk / "ballast", 2 * MIB)
    assert ballast.hold()
    blobs = Blobs(small_disk / "blobs", keep_free_bytes=2 * MIB)
    store = TaskStore(database, lease_s=600)
    ids = submit(store, 12)
    worker = worker_on(store, blobs, ballast=ballast)
    for _ in range(3):
        assert worker.step()

    held = [
        LeasedTask(task) for _ in range(3) for task in store.claim(OTHER)
    ]  # images stored, ends not recorded yet
    others = fill(small_disk)
    with pytest.raises(OperationalError) as caught:
        write_until_refused(database)
    assert is_full(caught.value)
    recorder = EndRecorder(store, ballast)
    for each in held:
        recorder.finish(each, ENDED)
    assert not (small_disk / "ballast").exists(), "it was not needed, so this proves nothing"
    assert worker.step()  # its image finds no room: the task goes back
    states = [task.status for task in store.get(ids) if task is not None]
    assert states.count(Status.COMPLETED) == 6
    assert len(states) == 12 and Status.FAILED not in states

    others.unlink()
    assert ballast.hold()
    patience = threading.Timer(120, worker.stop)  # a task that is lost would be waited for
    patience.start()
    for _ in range(6):
        assert worker.step()
    patience.cancel()
    assert [task and task.status for task in store.get(ids)] == [Status.COMPLETED] * 12
    database.dispose()


ENDED = Outcome(Status.COMPLETED, outputs=["a/1/0.png"], has_nsfw_contents=[False])


def write_until_refused(database: Engine) -> None:
    """Use up what room SQLite has reserved in its files."""
    for _ in range(3000):
        name = f"{random.getrandbits(128):x}"
        with database.begin() as db:
            db.execute(insert(secrets), {"name": name, "value": "x" * 128})
