"""From a group of claimed tasks to their ends: pictures in, one run on the device, images out.

Each task of a group ends for itself: one whose picture cannot be had, or whose images cannot be
made, does not touch the others. Knows no store, no leases beyond ``LeasedTask``, and no torch.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import structlog

from redux_pipelines.contract.types import (
    GenerationRequest,
    Pipeline,
    Progress,
    Result,
    SafetyChecker,
)
from redux_pipelines.errors import DeviceError, ReduxError
from redux_pipelines.images.files import encode
from redux_pipelines.images.safety import black_out
from redux_server import metrics
from redux_server.net.guard import FetchError
from redux_server.pictures.decode import DecodeError
from redux_server.storage.blobs import BlobStore, StorageError
from redux_server.tasks.task import Code, Outcome, Status
from redux_server.worker.inputs import ImageGone, ImageLoader, generation_request, load_pictures
from redux_server.worker.leased import Abandoned, Cancelled, LeasedTask, logged_together
from redux_server.worker.outputs import Postponed, RetryingStore, provenance

_log = structlog.get_logger("redux_server.worker.batch")


@dataclass(slots=True, eq=False)
class BatchMember:
    """A task of a group on the device, and what came of it."""

    held: LeasedTask
    request: GenerationRequest
    end: Result | Exception | None = None


class BatchRunner:
    """Makes the images of tasks with one pipeline.

    ``device`` has one thread, on which alone the pipeline runs: what torch compiles and captures
    belongs to the thread that made it.
    """

    def __init__(
        self,
        *,
        images: ImageLoader,
        pipeline: Pipeline,
        safety: SafetyChecker,
        blobs: BlobStore,
        worker_id: str = "worker",
        device: Executor | None = None,
        force_safety: bool = False,
    ) -> None:
        self._images = images
        self._pipeline = pipeline
        self._safety = safety
        self._device = device or ThreadPoolExecutor(1, thread_name_prefix="device")
        self._force_safety = force_safety
        self._caches = metrics.CacheMeter()
        self._stopping = threading.Event()
        self.device_is_idle = threading.Event()  # cleared while a group is on the device
        self.device_is_idle.set()
        self._blobs = RetryingStore(blobs, worker_id=worker_id, stopping=self._stopping)

    def stop(self) -> None:
        """Begin nothing more on the device; what is there is finished."""
        self._stopping.set()

    def wait_until_usable(self) -> None:
        """Return at once, unless images have nowhere to go: then when they have, or at ``stop``."""
        self._blobs.wait_until_usable()

    def work(
        self,
        group: Sequence[LeasedTask],
        has_begun: Callable[[], None],
        *,
        has_left: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[LeasedTask, Outcome | Postponed | None]]:
        """Work off ``group``; yields each task's end, or why it has none yet, as it comes.

        None stands for a task that is no longer ours to end.

        ``has_begun`` is called when the group is on the device and another may be prepared,
        ``has_left`` when the device is idle again, which a lost one never is. Raises
        ``DeviceError`` if the device was lost: tasks without an end then had a part in it.
        """
        parts = []
        for held, request in zip(group, self._prepare_all(group), strict=True):
            if isinstance(request, GenerationRequest):
                parts.append(BatchMember(held, request))
            else:
                yield held, _outcome_of(held, request)
        if parts:
            self._device.submit(self._on_device, parts, has_begun, has_left).result()
        for part in parts:
            yield part.held, self._end(part)

    def _prepare_all(self, group: Sequence[LeasedTask]) -> list[GenerationRequest | Exception]:
        if len(group) < 2:
            return [self._prepare(held) for held in group]
        # Side by side: a slow picture keeps its mates waiting, but not one after the other.
        with ThreadPoolExecutor(len(group), thread_name_prefix="picture") as threads:
            return list(threads.map(self._prepare, group))

    def _prepare(self, held: LeasedTask) -> GenerationRequest | Exception:
        given = held.task.input
        try:
            with held.logged(), held.timed("fetch"):
                pictures = load_pictures(self._images.load, given)
            return generation_request(given, pictures)
        except StorageError as error:  # of the input picture
            self._blobs.note_failure(1)
            return Postponed(f"its picture could not be read: {error}")
        except Exception as error:
            return error

    def _on_device(
        self, parts: list[BatchMember], has_begun: Callable[[], None], has_left: Callable[[], None]
    ) -> None:
        self.device_is_idle.clear()
        # A task that was given back may have killed its worker. It is worked on alone, so that it
        # cannot take the next one down with it, again and again.
        if not any(part.held.is_suspect for part in parts):
            has_begun()
        started = time.perf_counter()
        try:
            with logged_together([part.held for part in parts]):
                self._generate(parts)
            self.device_is_idle.set()
            has_left()
        except DeviceError:
            self.stop()  # before the next group, which waits for this very thread, gets its turn
            raise
        finally:
            self._caches.update(self._pipeline.cache_stats())
        for part in parts:
            part.held.note("inference", time.perf_counter() - started)

    def _generate(self, parts: list[BatchMember]) -> None:
        """Give every part its end. A group that fails is tried again in halves, down to one."""
        parts = [part for part in parts if self._may_begin(part)]
        if not parts:
            return
        try:
            self._drive(parts)
        except DeviceError:
            raise
        except Exception as error:
            if len(parts) == 1:
                parts[0].end = error
            else:
                _log.warning("a batch failed and is tried in halves", exc_info=error)
        # Not within the except clause: the error holds what its frames do, tensors too.
        rest = [part for part in parts if part.end is None]
        if rest:
            half = (len(rest) + 1) // 2
            self._generate(rest[:half])
            self._generate(rest[half:])

    def _drive(self, parts: list[BatchMember]) -> None:
        """Run the pipeline until each part has its end, or nobody wants those that have none."""
        metrics.BATCH_SIZE.observe(sum(part.request.num_images for part in parts))
        with closing(self._pipeline.generate_batch([part.request for part in parts])) as events:
            for place, event in events:
                part = parts[place]
                if isinstance(event, Progress):
                    part.held.step = event.step
                elif part.end is None:
                    part.end = event
                # In company, the images of a task that is dropped are made nevertheless.
                if not any([_is_wanted(each) for each in parts]):
                    return
        raise RuntimeError("the pipeline ended without a result")

    def _may_begin(self, part: BatchMember) -> bool:
        if self._stopping.is_set():
            part.end = Abandoned("the worker is stopping")
        return _is_wanted(part)

    def _end(self, part: BatchMember) -> Outcome | Postponed | None:
        try:
            with part.held.logged():
                if isinstance(part.end, Result):
                    return self._store_images(part, part.end)
                raise part.end or RuntimeError("the pipeline ended without a result")
        except Exception as error:
            return _outcome_of(part.held, error)

    def _store_images(self, part: BatchMember, result: Result) -> Outcome:
        held, task = part.held, part.held.task
        for stage, seconds in result.timings.items():
            held.note(stage.removesuffix("_s"), seconds)
        metrics.STEPS.labels(result.quality, "computed").inc(result.computed_steps)
        metrics.STEPS.labels(result.quality, "reused").inc(result.reused_steps)
        flags = (False,) * len(result.images)
        if self._force_safety or task.input["enable_safety_checker"]:
            with held.timed("safety"):
                flags = self._safety.check(result.images)
        keys, kind = [], task.input.get("output_format", "png")
        with held.timed("store"):
            for i, image in enumerate(black_out(result.images, flags)):
                key = f"{task.id}/{task.attempt}/{i}.{kind}"
                made = provenance(
                    self._pipeline.info, part.request, seed=result.seeds[i], quality=result.quality
                )
                data = encode(image, made, kind)
                self._blobs.put(key, data, check_wanted=held.check_wanted)
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


def _is_wanted(part: BatchMember) -> bool:
    """Whether its end is still to come; one that nobody waits for any more gets it here."""
    if part.end is None:
        try:
            part.held.check_wanted()
        except (Abandoned, Cancelled) as error:
            part.end = error
    return part.end is None


def _outcome_of(held: LeasedTask, error: Exception) -> Outcome | Postponed | None:
    """What a task's owner is told of ``error``; none where the task has not ended."""
    with held.logged():
        match error:
            case Abandoned():
                _log.warning("task abandoned", reason=str(error))
                return None
            case Postponed():
                return error
            case Cancelled():
                return Outcome.cancellation()
            case FetchError() | DecodeError() | ImageGone():
                if isinstance(error, FetchError):
                    metrics.FETCH_BLOCKED.labels(error.reason).inc()
                return Outcome.failure(Code.MEDIA_ACCESS_FAILED, str(error))
            case ReduxError():
                return Outcome.failure(Code.TASK_FAILED, str(error))
        _log.error("task failed", exc_info=error)
        return Outcome.failure(
            Code.INTERNAL, "The worker could not make this image; its log says why."
        )
