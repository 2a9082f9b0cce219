"""A worker's surroundings: a real store and folder, pictures, checkers and pipelines to order."""

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from prometheus_client import REGISTRY
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from redux_pipelines.contract.types import BatchEvent, GenerationRequest
from redux_pipelines.fake import FakePipeline
from redux_server.storage.blobs import Blobs
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Created, NewTask, Task
from redux_server.worker.batch import BatchRunner
from redux_server.worker.loop import Worker
from server.in_process import Clock

ME, OTHER = "host/cpu", "host/other"
INPUT = {
    "image": "https://example.com/a.png",
    "prompt": "",
    "size": "512*520",
    "seed": 7,
    "num_inference_steps": 3,
    "guidance_scale": 3.5,
    "num_images": 1,
    "enable_safety_checker": True,
}


class Images:
    """Loads one grey picture for any reference, or raises what it was given."""

    def __init__(self, *, raises: Exception | None = None) -> None:
        self.raises = raises
        self.loaded: list[str] = []

    def load(self, reference: str, use: Callable[[Image.Image], Any]) -> Any:
        self.loaded.append(reference)
        if self.raises is not None:
            raise self.raises
        return use(Image.new("RGB", (32, 32), "gray"))


class Safety:
    """Flags the images at the places it was given."""

    def __init__(self, *flagged: int) -> None:
        self.flagged = flagged
        self.checked = 0

    def check(self, images: tuple[Image.Image, ...]) -> tuple[bool, ...]:
        self.checked += 1
        return tuple(place in self.flagged for place in range(len(images)))


class GatedPipeline(FakePipeline):
    """The fake pipeline, but each step waits to be let through."""

    def __init__(self) -> None:
        super().__init__()
        self.is_running = threading.Event()
        self.gate = threading.Semaphore(0)
        self.closed = 0
        self.seen: list[GenerationRequest] = []

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> Any:
        self.seen += requests
        return self._gated(super().generate_batch(requests))

    def _gated(self, events: Iterator[BatchEvent]) -> Iterator[BatchEvent]:
        try:
            for event in events:
                self.is_running.set()
                assert self.gate.acquire(timeout=20)
                yield event
        finally:
            self.closed += 1

    def open(self) -> None:
        """Let everything through from now on."""
        self.gate.release(10_000)


class UnreliableStore:
    """A store whose ``method`` fails the first ``times``."""

    def __init__(self, store: TaskStore, method: str, times: int) -> None:
        self._store = store
        self._method = method
        self.failures_left = times

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._store, name)
        if name != self._method:
            return real

        def unreliable(*given: Any, **more: Any) -> Any:
            if self.failures_left:
                self.failures_left -= 1
                raise OperationalError("UPDATE tasks", {}, Exception("database is locked"))
            return real(*given, **more)

        return unreliable


class Bench:
    """A worker's surroundings: a real store and folder, and how to put workers there."""

    def __init__(self, database: Engine, folder: Path, clock: Clock) -> None:
        self.clock = clock
        self.store = TaskStore(database, lease_s=30, max_attempts=3, clock=clock)
        self.folder = folder
        self.blobs = Blobs(folder)
        self.undo: list[Callable[[], None]] = []  # stops what runs, when a test fails half-way

    def worker(self, **parts: Any) -> Worker:
        given: dict[str, Any] = {
            "blobs": self.blobs,
            "images": Images(),
            "pipeline": FakePipeline(),
            "safety": Safety(),
            **parts,
        }
        ours = {"store": self.store, "heartbeat_s": 0.02}
        names = ("store", "heartbeat_s", "max_batch_size", "batch_timeout_s", "drain_timeout_s")
        ours |= {name: given.pop(name) for name in names if name in given}
        worker = Worker(ME, runner=BatchRunner(**given), **ours)
        self.undo += [worker.stop, getattr(given["pipeline"], "open", worker.stop)]
        return worker

    @contextmanager
    def beside(self, function: Callable[[], Any]) -> Iterator[threading.Thread]:
        """Run ``function`` beside the test; an exception in either fails it, and ends both."""
        errors: list[BaseException] = []

        def call() -> None:
            try:
                function()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        try:
            yield thread
        except BaseException:
            for action in self.undo:
                action()
            raise
        finally:
            thread.join(20)
        assert not thread.is_alive()
        assert not errors, errors

    def submit(self, *, shape: str = "", key_id: str = "key", **parameters: Any) -> str:
        new = NewTask(key_id, "model", {**INPUT, **parameters}, shape=shape)
        self.clock.now += 1  # the queue is ordered by time
        (accepted,) = self.store.accept([new], max_open=100)
        assert isinstance(accepted, Created)
        return new.id

    def task(self, task_id: str) -> Task:
        (task,) = self.store.get([task_id])
        assert task is not None
        return task

    def picture(self, key: str) -> Image.Image:
        return Image.open(io.BytesIO(self.blobs.get(key)))

    def done(self, *, parameters: dict[str, Any] | None = None, **parts: Any) -> Task:
        """One task, worked off by a worker of these parts."""
        task_id = self.submit(**(parameters or {}))
        assert self.worker(**parts).step()
        return self.task(task_id)


def ended(reason: str = "", status: str = "completed") -> float:
    """How many tasks have been counted as ended so."""
    return REGISTRY.get_sample_value(
        "flux_redux_tasks_total", {"status": status, "reason": reason}
    ) or 0.0  # fmt: skip
