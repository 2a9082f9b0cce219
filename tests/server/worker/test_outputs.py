"""A worker whose images find no room, or whose store is away: it waits, and loses no task."""

import contextlib
import errno
import http.server
import random
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert
from sqlalchemy.exc import OperationalError

from redux_pipelines.fake import FakePipeline
from redux_server.database.migration import open_database
from redux_server.database.tables import secrets
from redux_server.net.fetch import ImageFetcher
from redux_server.net.guard import AddressPolicy
from redux_server.storage.blobs import Blobs, StorageError
from redux_server.storage.disk import Ballast, is_full
from redux_server.storage.signing import Signer
from redux_server.storage.temporary import check_room, nameless_file
from redux_server.tasks.store import TaskStore
from redux_server.tasks.stored import FILE_BYTES, row_bytes
from redux_server.tasks.task import Created, NewTask, Outcome, Status
from redux_server.worker.batch import BatchRunner
from redux_server.worker.inputs import ImageLoader
from redux_server.worker.leased import MAX_STARTS, EndRecorder, LeasedTask
from redux_server.worker.loop import Worker
from server.full_disk import MIB, fill
from server.worker_bench import INPUT, ME, OTHER, Bench, Images, Safety
from threaded import answering


class Answering(http.server.ThreadingHTTPServer):
    """A site with one file."""

    def __init__(self, body: bytes) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


class RefusingBlobs:
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
    return Worker(ME, store=store, ballast=ballast, runner=BatchRunner(blobs=blobs, **given))


@pytest.mark.usefixtures("no_pauses")
def test_short_shortage_is_waited_out_without_making_the_image_again(
    database: Engine, tmp_path: Path
) -> None:
    store, refusing = TaskStore(database), RefusingBlobs(Blobs(tmp_path / "blobs"), failures=3)
    (task_id,) = submit(store)
    assert worker_on(store, refusing).step()
    (task,) = store.get([task_id])
    assert task is not None
    assert (task.status, task.attempt) == (Status.COMPLETED, 1)
    assert refusing.puts == [f"{task_id}/1/0.png"] * 4


@pytest.mark.usefixtures("no_pauses")
def test_task_whose_images_find_no_room_comes_back_later(
    database: Engine, tmp_path: Path, clock: Any
) -> None:
    store, refusing = (
        TaskStore(database, clock=clock),
        RefusingBlobs(Blobs(tmp_path / "blobs"), failures=4),
    )
    (task_id,) = submit(store)
    worker = worker_on(store, refusing)
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
    store, refusing = (
        TaskStore(database, clock=clock),
        RefusingBlobs(Blobs(tmp_path / "blobs"), failures=7),
    )
    first, second = submit(store, 2)
    worker = worker_on(store, refusing)
    assert worker.step()  # four tries for an image
    assert worker.step()  # three probes, the fourth gets through
    probes = [key for key in refusing.puts if key.startswith("probe/")]
    assert len(probes) == 4
    states = [task.status for task in store.get([first, second]) if task is not None]
    assert states == [Status.PROCESSING, Status.COMPLETED]
    assert refusing._blobs.tasks_before(time.time() + 60) == {second}, "a probe was left behind"


@pytest.mark.usefixtures("no_pauses")
def test_task_is_given_up_after_many_starts(database: Engine, tmp_path: Path, clock: Any) -> None:
    store = TaskStore(database, clock=clock)
    (task_id,) = submit(store)
    for _ in range(MAX_STARTS - 1):
        (claimed,) = store.claim(OTHER)
        assert store.give_back(task_id, claimed.attempt)
    refusing = RefusingBlobs(Blobs(tmp_path / "blobs"), failures=4)
    assert worker_on(store, refusing).step()
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


# --- A real disk that fills up --------------------------------------------------------------------


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

    leased = [
        LeasedTask(task) for _ in range(3) for task in store.claim(OTHER)
    ]  # images stored, ends not recorded yet
    others = fill(small_disk)
    with pytest.raises(OperationalError) as caught:
        write_until_refused(database)
    assert is_full(caught.value)
    recorder = EndRecorder(store, ballast)
    for each in leased:
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


# --- Room for what comes in -----------------------------------------------------------------------


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE])
def test_a_picture_that_this_machine_cannot_keep_comes_later_and_fails_nobody(
    database: Engine, tmp_path: Path, clock: Any, number: int
) -> None:
    store, blobs = TaskStore(database, clock=clock), Blobs(tmp_path / "blobs")
    images, checks = Images(raises=OSError(number, "as if")), []

    def check_room(size_bytes: int) -> None:
        checks.append(size_bytes)
        if len(checks) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    (task_id,) = submit(store)
    worker = worker_on(store, blobs, images=images, check_room=check_room)
    assert worker.step()
    (task,) = store.get([task_id])
    assert task is not None
    assert (task.status, task.crashes, task.outcome) == (Status.PROCESSING, 0, None)
    images.raises = None
    clock.now += 5.5
    assert worker.step()  # begins nothing before there is room
    assert checks == [20 * MIB] * 3
    (task,) = store.get([task_id])
    assert task is not None
    assert (task.status, task.attempt) == (Status.COMPLETED, 2)


def test_a_fetched_picture_that_finds_no_room_is_postponed(
    database: Engine, small_disk: Path, tmp_path: Path
) -> None:
    """Through the fetcher, on a real disk that is full."""
    store, picture = TaskStore(database), random.Random(7).randbytes(2 * MIB)

    policy = AddressPolicy.from_entries(["127.0.0.1:*"])
    fetcher = ImageFetcher(policy, open_file=partial(nameless_file, small_disk / "tmp"))
    blobs = Blobs(tmp_path / "blobs")
    loader = ImageLoader(blobs, Signer(b"secret", clock=time.time), fetcher)
    check_small = partial(check_room, small_disk / "tmp")
    with answering(Answering(picture)) as site:
        url = f"http://127.0.0.1:{site.server_address[1]}/a.png"
        assert fetcher.fetch(url) == picture
        fill(small_disk)
        new = NewTask("key", "model", {**INPUT, "image": url})
        store.accept([new], max_open=9)
        worker_on(store, blobs, images=loader, check_room=check_small).step()
    (task,) = store.get([new.id])
    assert task is not None
    assert (task.status, task.outcome) == (Status.PROCESSING, None)


@pytest.mark.usefixtures("no_pauses")
def test_a_disk_that_is_full_while_an_image_is_made_fails_no_task(
    database: Engine, tmp_path: Path
) -> None:
    class Full(FakePipeline):
        def generate_batch(self, requests: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/of-a-compiler")

    store = TaskStore(database)
    (task_id,) = submit(store)
    worker_on(store, Blobs(tmp_path / "blobs"), pipeline=Full()).step()
    (task,) = store.get([task_id])
    assert task is not None
    assert (task.status, task.outcome) == (Status.PROCESSING, None)


# --- what is left of images, and counted ----------------------------------------------------------


def images_of(bench: Bench, task_id: str) -> list[Path]:
    return sorted((bench.folder / task_id).rglob("*.png"))


def counted(bench: Bench) -> int:
    """What images count of all that is stored, of one task without inline pictures."""
    [size] = bench.store.stored_bytes().values()
    return size - row_bytes(INPUT)


def submit_with_room(bench: Bench, output_bytes: int, **parameters: Any) -> str:
    new = NewTask("key", "model", {**INPUT, **parameters}, output_bytes=output_bytes)
    bench.store.accept([new], max_open=100)
    return new.id


def lose_a_worker(bench: Bench) -> None:
    bench.store.claim(OTHER)
    bench.store.release(OTHER)


def test_images_count_what_they_take(bench: Bench) -> None:
    task_id = submit_with_room(bench, 10**6)
    assert bench.worker().step()
    [image] = images_of(bench, task_id)
    assert counted(bench) == image.stat().st_size + FILE_BYTES


def test_images_of_a_task_that_is_cancelled_between_them_are_deleted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = submit_with_room(bench, 10**6, num_images=2)
    worker = bench.worker()
    stored: list[str] = []
    put = Blobs.put

    def put_and_cancel(self: Blobs, key: str, data: bytes | memoryview) -> None:
        put(self, key, data)
        stored.append(key)
        bench.store.cancel(task_id, "key")
        worker._leased[task_id].is_cancelled = True

    monkeypatch.setattr(Blobs, "put", put_and_cancel)
    assert worker.step()
    assert bench.task(task_id).status is Status.CANCELLED
    assert len(stored) == 1 and not images_of(bench, task_id)
    assert counted(bench) == 0


def test_images_of_an_attempt_that_ended_in_the_middle_are_deleted_by_the_next(
    bench: Bench,
) -> None:
    task_id = submit_with_room(bench, 10**6)
    lose_a_worker(bench)
    bench.blobs.put(f"{task_id}/1/0.png", b"of the worker that was lost")
    assert bench.worker().step()
    assert [path.parent.name for path in images_of(bench, task_id)] == ["2"]


def test_what_could_not_be_deleted_still_counts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise StorageError("away")

    task_id = submit_with_room(bench, 1000)
    lose_a_worker(bench)
    monkeypatch.setattr(Blobs, "delete_under", fail)
    assert bench.worker().step()
    assert bench.task(task_id).status is Status.COMPLETED
    assert counted(bench) == 2 * 1000  # of each attempt all that it may have left
