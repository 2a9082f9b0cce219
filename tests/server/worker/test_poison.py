"""Real worker processes under the embedded engine, and tasks that kill them."""

import asyncio
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from redux_server.database.migration import open_database
from redux_server.dispatch.local import LocalWorkers
from redux_server.dispatch.presence import EXIT_DEVICE_FAILED, Presence
from redux_server.metrics import WorkerReports
from redux_server.settings import ServerSettings
from redux_server.storage.blobs import Blobs
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Status, Task

# The worker as it is, but for a pipeline that DIEs of the prompt "poison", and a diary.
WORKER = """
import os, signal, sys, time

def note(*what):
    with open(os.environ["FLUX_REDUX_DATA_DIR"] + "/diary", "a") as diary:
        print(time.monotonic(), *what, file=diary)
note("started")

from redux_pipelines.errors import DeviceError
from redux_pipelines.fake import FakePipeline
from redux_server.worker import main
from redux_server.settings import ServerSettings, build

settings = build(ServerSettings, {}, os.environ)

class Poisonable(FakePipeline):
    def generate_batch(self, requests):
        events = super().generate_batch(requests)
        prompts = [request.prompt for request in requests]
        note("batch", ",".join(prompts))
        yield next(events)
        if "poison" in prompts:
            note("dies")
            DIE
        yield from events

main.load_model = lambda *_: (Poisonable(max_batch_size=4), None)
sys.exit(main.run_worker(settings, device=settings.device, is_supervised=True))
"""
DEATHS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "device lost": "raise DeviceError('the device failed: CUDA error: device-side assert')",
}
REASONS = {
    "killed": "The worker stopped unexpectedly 3 times during this task.",
    "device lost": "This task cost too many workers their device. The last time: the device "
    "failed: CUDA error: device-side assert",
}


class Diary:
    """What the workers wrote."""

    def __init__(self, folder: Path) -> None:
        lines = [line.split(maxsplit=2) for line in (folder / "diary").read_text().splitlines()]
        self.entries = [(float(line[0]), *line[1:]) for line in lines]

    def times(self, what: str) -> list[float]:
        return [entry[0] for entry in self.entries if entry[1] == what]

    @property
    def batches(self) -> list[list[str]]:
        return [str(entry[2]).split(",") for entry in self.entries if entry[1] == "batch"]


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, "condition not met in time"
        await asyncio.sleep(0.1)


def submit(store: TaskStore, prompts: str) -> list[str]:
    parameters: dict[str, Any] = {
        "image": "blob:given/input",
        "size": "512*512",
        "seed": 1,
        "num_inference_steps": 2,
        "guidance_scale": 3.5,
        "num_images": 1,
        "enable_safety_checker": False,
    }
    new = [
        NewTask("key", "model", {**parameters, "prompt": prompt}, shape="512*512/2//prompt")
        for prompt in prompts.split()
    ]
    store.accept(new, max_open=100)
    return [task.id for task in new]


# Quickly, a lost device is the next test's, and its reason tests/server/worker/test_batch.py's.
@pytest.mark.parametrize("death", ["killed", pytest.param("device lost", marks=pytest.mark.slow)])
def test_a_poison_task_fails_and_its_batch_mates_complete(tmp_path: Path, death: str) -> None:
    settings = ServerSettings(
        data_dir=tmp_path, device="cpu", model="fake", max_batch_size=4, drain_timeout_s=20.0
    )
    database = open_database(settings.database)
    store, presence = TaskStore(database, max_attempts=3), Presence(database)
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(picture, "PNG")
    Blobs(settings.blobs_dir).put("given/input", picture.getvalue())
    tasks = submit(store, "a poison b c")

    def found() -> list[Task]:
        return [task for task in store.get(tasks) if task is not None]

    async def run() -> None:
        command = (sys.executable, "-c", WORKER.replace("DIE", DEATHS[death]))
        engine = LocalWorkers(settings, store, presence, WorkerReports(), command=command)
        await engine.start()
        try:
            await until(lambda: all(task.status.is_terminal for task in found()), 150)
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(run(), 200))
    first, poison, *others = found()
    database.dispose()
    diary = Diary(tmp_path)
    assert {task.status for task in (first, *others)} == {Status.COMPLETED}
    assert poison.status is Status.FAILED
    assert poison.outcome is not None
    assert poison.outcome.error == REASONS[death]
    assert poison.attempt == 3
    assert diary.batches[0] == ["a", "poison", "b", "c"]
    assert sorted(diary.batches[1:]) == [["a"], ["b"], ["c"], ["poison"], ["poison"]]
    for died, started in zip(diary.times("dies"), diary.times("started")[1:], strict=True):
        assert started - died < 10


def test_a_worker_that_lost_its_device_says_so_by_its_exit_code(tmp_path: Path) -> None:
    settings = ServerSettings(data_dir=tmp_path, device="cpu", model="fake")
    database = open_database(settings.database)
    store = TaskStore(database)
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(picture, "PNG")
    Blobs(settings.blobs_dir).put("given/input", picture.getvalue())
    (task,) = submit(store, "poison")
    codes = []

    class Once(LocalWorkers):
        def _take_back(self, device: str, code: int) -> int:
            codes.append(code)
            self._stopping.set()
            return super()._take_back(device, code)

    async def run() -> None:
        command = (sys.executable, "-c", WORKER.replace("DIE", DEATHS["device lost"]))
        engine = Once(settings, store, Presence(database), WorkerReports(), command=command)
        await engine.start()
        await until(lambda: bool(codes), 60)
        await engine.stop()

    asyncio.run(asyncio.wait_for(run(), 100))
    (found,) = store.get([task])
    database.dispose()
    assert codes == [EXIT_DEVICE_FAILED]
    assert found is not None
    assert (found.status, found.crashes, found.attempt) == (Status.PROCESSING, 1, 1)
