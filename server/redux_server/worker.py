"""The worker: takes a task, makes its images, records how it ended.

``step`` is one task from claim to finish, in plain order. A few identical lanes run it side by
side, so that while one task is on the device the next one's picture is being fetched and the last
one's images are being checked, encoded and stored. Knows no HTTP and no torch: the pipeline, the
checker and the store are given to it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from redux_pipelines.errors import ReduxError
from redux_pipelines.images import encode_png
from redux_pipelines.safety import black_out
from redux_pipelines.types import GenerationRequest, Pipeline, Result, SafetyChecker
from redux_server import metrics
from redux_server.blobs import Blobs
from redux_server.decode import DecodeError
from redux_server.images import ImageGone, ImageLoader
from redux_server.netguard import FetchError
from redux_server.provenance import provenance
from redux_server.schemas import parse_size
from redux_server.store import TaskStore
from redux_server.tasks import Code, Outcome, Status, Task

LANES = 3
POLL_S = 0.5
_log = structlog.get_logger("redux_server.worker")


class Abandoned(Exception):
    """Work on a task stops without an end: it was lost to another worker, or we are stopping."""


@dataclass(slots=True)
class _Held:
    """A task this worker has leased. Written by its lane and by the heartbeat thread."""

    attempt: int
    step: int = 0
    is_lost: bool = False
    timings: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Note how long a stage took, in whole milliseconds."""
        started = time.perf_counter()
        yield
        self.note(stage, time.perf_counter() - started)

    def note(self, stage: str, seconds: float) -> None:
        """Note a stage's time."""
        self.timings[stage] = round(seconds * 1000)
        metrics.STAGES.labels(stage).observe(seconds)


class Worker:
    """Works off tasks on one device until stopped.

    ``device`` has one thread, on which alone the pipeline runs: what torch compiles and captures
    belongs to the thread that made it.
    """

    def __init__(
        self,
        worker_id: str,
        *,
        store: TaskStore,
        blobs: Blobs,
        images: ImageLoader,
        pipeline: Pipeline,
        safety: SafetyChecker,
        device: Executor | None = None,
        force_safety: bool = False,
        heartbeat_s: float = 0.5,
    ) -> None:
        self._id = worker_id
        self._store = store
        self._blobs = blobs
        self._images = images
        self._pipeline = pipeline
        self._safety = safety
        self._force_safety = force_safety
        self._heartbeat_s = heartbeat_s
        self._held: dict[str, _Held] = {}
        self._stopping = threading.Event()
        self._work_arrived = threading.Event()
        self._has_ended = threading.Event()
        # One task at most waits for the device; more would keep it from other workers.
        self._next_up = threading.Semaphore(1)
        self._caches = metrics.CacheMeter()
        self._device = device or ThreadPoolExecutor(1, thread_name_prefix="device")

    def wake(self) -> None:
        """There may be work: look now instead of at the next poll."""
        self._work_arrived.set()

    def stop(self) -> None:
        """Claim nothing more; what is on the device is finished. Callable from a signal handler."""
        self._stopping.set()
        self._work_arrived.set()

    def run(self) -> None:
        """Work until ``stop``; then return what was claimed but not begun."""
        lanes = [threading.Thread(target=self._lane, name=f"lane-{i}") for i in range(LANES)]
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        for thread in (*lanes, heart):
            thread.start()
        for lane in lanes:
            lane.join()
        self._has_ended.set()
        heart.join()
        self._store.release(self._id, has_crashed=False)

    def step(self) -> bool:
        """Work off one task. False when none came before ``stop`` (or, once stopped, at once)."""
        self._next_up.acquire()
        waits = _Once(self._next_up.release)
        try:
            task = self._claim()
            if task is None:
                return False
            held = self._hold(task)
            with structlog.contextvars.bound_contextvars(
                task_id=task.id, attempt=task.attempt, request_id=task.request_id
            ):
                try:
                    self._finish(task, self._outcome(task, held, waits))
                except Abandoned as reason:
                    _log.warning("task abandoned", reason=str(reason))
                finally:
                    self._let_go(task, held)
            return True
        finally:
            waits()

    def _lane(self) -> None:
        while not self._stopping.is_set():
            try:
                self.step()
            except Exception as error:  # the database may be away; the lane must outlive that
                _log.error("worker step failed", exc_info=error)
                self._stopping.wait(1.0)

    def _claim(self) -> Task | None:
        while not self._stopping.is_set():
            self._work_arrived.clear()
            task = self._store.claim(self._id)
            if task is not None:
                if task.crashes:
                    metrics.REDELIVERIES.inc()
                return task
            self._work_arrived.wait(POLL_S)
        return None

    def _hold(self, task: Task) -> _Held:
        former = self._held.get(task.id)
        if former is not None:  # a lane lost it while this process was frozen, another has it now
            former.is_lost = True
        held = self._held[task.id] = _Held(task.attempt)
        return held

    def _let_go(self, task: Task, held: _Held) -> None:
        if self._held.get(task.id) is held:
            del self._held[task.id]

    def _outcome(self, task: Task, held: _Held, waits: Callable[[], None]) -> Outcome:
        try:
            return self._work(task, held, waits)
        except (FetchError, DecodeError, ImageGone) as error:
            if isinstance(error, FetchError):
                metrics.FETCH_BLOCKED.labels(error.reason).inc()
            return Outcome.failure(Code.MEDIA_ACCESS_FAILED, str(error))
        except ReduxError as error:
            return Outcome.failure(Code.TASK_FAILED, str(error))
        except Abandoned:
            raise
        except Exception as error:
            _log.error("task failed", exc_info=error)
            return Outcome.failure(
                Code.INTERNAL, "The worker could not make this image; its log says why."
            )

    def _work(self, task: Task, held: _Held, waits: Callable[[], None]) -> Outcome:
        with held.timed("fetch"):
            image = self._images.load(task.input["image"])
        width, height = parse_size(task.input["size"])
        request = GenerationRequest(
            image=image,
            prompt=task.input["prompt"],
            width=width,
            height=height,
            seed=task.input["seed"],
            num_inference_steps=task.input["num_inference_steps"],
            guidance_scale=task.input["guidance_scale"],
            num_images=task.input["num_images"],
            quality=task.input.get("quality"),
        )
        context = copy_context()  # for the log's task id
        on_device = self._device.submit(context.run, self._on_device, task, request, held, waits)
        result = on_device.result()
        for stage, seconds in result.timings.items():
            held.note(stage.removesuffix("_s"), seconds)
        metrics.STEPS.labels(result.quality, "computed").inc(result.computed_steps)
        metrics.STEPS.labels(result.quality, "reused").inc(result.reused_steps)
        return self._store_images(task, request, held, result)

    def _on_device(
        self, task: Task, request: GenerationRequest, held: _Held, waits: Callable[[], None]
    ) -> Result:
        # A task that was given back may have killed its worker. It is worked on alone, so that it
        # cannot take the next one down with it, again and again.
        if task.crashes == 0:
            waits()
        try:
            with held.timed("inference"):
                return self._generate(request, held)
        finally:
            self._caches.update(self._pipeline.cache_stats())

    def _generate(self, request: GenerationRequest, held: _Held) -> Result:
        self._check_still_wanted(held)
        for event in self._pipeline.generate(request):
            if isinstance(event, Result):
                return event
            held.step = event.step
            self._check_lease(held)
        raise RuntimeError("the pipeline ended without a result")

    def _store_images(
        self, task: Task, request: GenerationRequest, held: _Held, result: Result
    ) -> Outcome:
        flags = (False,) * len(result.images)
        if self._force_safety or task.input["enable_safety_checker"]:
            with held.timed("safety"):
                flags = self._safety.check(result.images)
        keys = []
        with held.timed("store"):
            for i, image in enumerate(black_out(result.images, flags)):
                self._check_lease(held)
                key = f"{task.id}/{task.attempt}/{i}.png"
                made = provenance(
                    self._pipeline.info, request, seed=result.seeds[i], quality=result.quality
                )
                self._blobs.put(key, encode_png(image, made))
                keys.append(key)
        return Outcome(
            status=Status.COMPLETED,
            outputs=keys,
            has_nsfw_contents=list(flags),
            seeds=list(result.seeds),
            timings=held.timings,
            quality=result.quality,
            reused_steps=result.reused_steps,
        )

    def _finish(self, task: Task, outcome: Outcome) -> None:
        for pause_s in (0.2, 1.0, 5.0, None):
            try:
                recorded = self._store.finish(task.id, task.attempt, outcome)
                break
            except SQLAlchemyError as error:
                # Unrecorded, the lease runs out and the task is done again: late, but not lost.
                _log.error("could not record the end of a task", exc_info=error)
                if pause_s is None:
                    return
                time.sleep(pause_s)
        if not recorded:
            metrics.FENCED.inc()
            raise Abandoned("another worker has taken it over")
        self._report(task, outcome)

    def _report(self, task: Task, outcome: Outcome) -> None:
        now = time.time()
        reason = "" if outcome.status is Status.COMPLETED else str(outcome.code)
        metrics.TASKS.labels(outcome.status.value, reason).inc()
        metrics.E2E.observe(max(0.0, now - task.created_at))
        metrics.QUEUED.observe(max(0.0, (task.started_at or now) - task.created_at))
        metrics.INFERENCE.observe(outcome.timings.get("inference", 0) / 1000)
        details: dict[str, Any] = {"status": outcome.status.value, "timings_ms": outcome.timings}
        if outcome.error:
            details["error"] = outcome.error
        _log.info("task ended", **details)

    def _check_lease(self, held: _Held) -> None:
        if held.is_lost:
            raise Abandoned("its lease ran out")

    def _check_still_wanted(self, held: _Held) -> None:
        self._check_lease(held)
        if self._stopping.is_set():
            raise Abandoned("the worker is stopping")

    def _beat(self) -> None:
        """Renew leases while ``run`` does, draining included."""
        while not self._has_ended.wait(self._heartbeat_s):
            try:
                self._renew()
            except SQLAlchemyError as error:
                _log.error("heartbeat failed", exc_info=error)

    def _renew(self) -> None:
        held = dict(self._held)
        if not held:
            return
        progress = {key: (h.attempt, h.step) for key, h in held.items()}
        for task_id in self._store.renew(self._id, progress).lost:
            held[task_id].is_lost = True


class _Once:
    """Calls ``action`` at the first call only."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    def __call__(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()
