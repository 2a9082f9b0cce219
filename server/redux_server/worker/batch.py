"""One group of leased tasks, from their pictures through one run on the device to stored images.

Each task of a group ends for itself: one whose picture cannot be had, or whose images cannot be
made, does not touch the others. Knows no store, no leases beyond ``LeasedTask``, and no torch.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import structlog
from PIL import Image

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
from redux_server.pictures.decode import DecodeError, DecoderUnavailable
from redux_server.pictures.inline import MAX_BYTES
from redux_server.storage.blobs import BlobStore, StorageError
from redux_server.storage.disk import is_full
from redux_server.tasks.stored import FILE_BYTES
from redux_server.tasks.task import Code, Outcome, Status
from redux_server.worker.inputs import (
    ImageGone,
    ImageLoader,
    Seen,
    generation_request,
    has_remote_pictures,
    load_pictures,
)
from redux_server.worker.leased import Abandoned, Cancelled, LeasedTask, logged_together
from redux_server.worker.outputs import Postponed, RetryingStore, provenance
from redux_server.worker.prefetch import DeviceQueue, FetchTurns, Place
from redux_server.worker.previews import PreviewSender
from redux_server.worker.watchdog import Watchdog

_UNREAD = "The input picture could not be read"
SLOW_S, SLOW_DECODE_S = 1.0, 5.0
"""How long an idle device waits for a picture of another host, and for one that is here already."""
T = TypeVar("T")
_Preparation = Future[GenerationRequest | Exception]
_log = structlog.get_logger("redux_server.worker.batch")


@dataclass(slots=True, eq=False)
class BatchMember:
    """A task of a group on the device, and what came of it."""

    leased: LeasedTask
    request: GenerationRequest
    end: Result | Exception | None = None


class BatchRunner:
    """Makes the images of tasks with one pipeline.

    ``device`` has one thread, on which alone the pipeline runs: what torch compiles and captures
    belongs to the thread that made it. ``check_room`` raises ``OSError`` where so many bytes cannot
    be kept while a picture is fetched.
    """

    def __init__(
        self,
        *,
        images: ImageLoader,
        pipeline: Pipeline,
        safety: SafetyChecker,
        blobs: BlobStore,
        check_room: Callable[[int], None] = lambda _: None,
        worker_id: str = "worker",
        device: Executor | None = None,
        force_safety: bool = False,
        watchdog: Watchdog | None = None,
        previews: PreviewSender | None = None,
    ) -> None:
        self._images = images
        self._pipeline = pipeline
        self._safety = safety
        self._device = device or ThreadPoolExecutor(1, thread_name_prefix="device")
        self._force_safety = force_safety
        self._previews = previews
        self._caches = metrics.CacheMeter()
        self.watchdog = watchdog or Watchdog()
        self.on_device: tuple[LeasedTask, ...] = ()
        self._stopping = threading.Event()
        self.device_is_idle = threading.Event()  # cleared while a group is on the device
        self.device_is_idle.set()
        self._blobs = RetryingStore(
            blobs, worker_id=worker_id, stopping=self._stopping, check_room=check_room
        )
        self._queue = DeviceQueue()
        self._fetches = FetchTurns()

    def stop(self) -> None:
        """Begin nothing more on the device; what is there is finished."""
        self._stopping.set()

    def wait_until_usable(self) -> None:
        """Return at once, unless images have nowhere to go: then when they have, or at ``stop``."""
        self._blobs.wait_until_usable()

    @property
    def obstacle(self) -> str:
        """Why nothing can be begun just now; empty if it can."""
        if self._blobs.has_failed:
            return "the store of pictures is away or full"
        return ""

    def work(
        self,
        group: Sequence[LeasedTask],
        place: Place,
        *,
        has_left: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[LeasedTask, Outcome | Postponed | None]]:
        """Work off ``group``; yields each task's end, or why it has none yet, as it comes.

        None stands for a task that is no longer ours to end.

        ``place`` is told where the group is, so that others are prepared meanwhile; ``has_left`` is
        called when the device is idle again, which a lost one never is. Raises ``DeviceError`` if
        the device was lost: tasks without an end then had a part in it.
        """
        if not group:
            return
        # Side by side: a slow picture keeps no other waiting.
        with ThreadPoolExecutor(len(group), thread_name_prefix="picture") as threads:
            pending = {threads.submit(self._prepare, leased): leased for leased in group}
            while pending:
                members = []
                for prepared in self._next_prepared(pending, place):
                    leased, request = pending.pop(prepared), prepared.result()
                    if isinstance(request, GenerationRequest):
                        members.append(BatchMember(leased, request))
                    else:
                        yield leased, _outcome_of(leased, request)
                if members:
                    place.wait()
                    yield from self._run(members, place, has_left)

    def _next_prepared(
        self, pending: Mapping[_Preparation, LeasedTask], place: Place
    ) -> list[_Preparation]:
        """Those that go on the device together, in their order: all, unless some come slowly.

        An idle device does not wait for those. A suspect, which is alone, lets nobody pass.
        """
        began = time.monotonic()
        is_suspect = any(leased.is_suspect for leased in pending.values())
        is_slow = False
        while True:
            how = FIRST_COMPLETED if is_slow else ALL_COMPLETED
            wait(pending, timeout=None if is_slow else SLOW_S / 4, return_when=how)
            done = [each for each in pending if each.done()]
            rest = [leased.task for each, leased in pending.items() if each not in done]
            if is_slow or not rest:
                return done
            patience_s = SLOW_S if any(map(has_remote_pictures, rest)) else SLOW_DECODE_S
            if time.monotonic() - began < patience_s or not self.device_is_idle.is_set():
                continue
            if done:
                return done
            is_slow = not is_suspect and place.fetch_on(
                leased.task.key_id for leased in pending.values()
            )

    def _run(
        self, members: list[BatchMember], place: Place, has_left: Callable[[], None]
    ) -> Iterator[tuple[LeasedTask, Outcome | Postponed | None]]:
        keys = frozenset(member.leased.task.key_id for member in members)
        with self._queue.unstored():
            with self._queue.turn(keys, members[0].leased.task.priority):
                self._device.submit(self._on_device, members, place.begin, has_left).result()
            for member in members:
                yield member.leased, self._end(member)

    def _prepare(self, leased: LeasedTask) -> GenerationRequest | Exception:
        given = leased.task.input
        self._delete_earlier_images(leased)

        def load(reference: str, use: Callable[[Image.Image], T], /) -> T:
            with self._fetches.turn(leased.task.key_id):
                began = time.perf_counter()
                try:
                    return self._images.load(reference, use)
                finally:
                    leased.costs_s.append(time.perf_counter() - began)

        try:
            with leased.logged(), leased.timed("fetch"):
                pictures = load_pictures(load, given, partial(self._see, given))
                # here, for on its own thread the device would wait for it
                request = self._pipeline.preprocess(generation_request(given, pictures))
                # Of a mask that was applied, all that still counts is that there was one.
                mask = request.mask and Image.new("L", (1, 1))
                return replace(request, mask=mask)
        except StorageError as error:  # of the input picture
            self._blobs.note_failure(1)
            return Postponed(f"its picture could not be read: {error}", _UNREAD)
        except (DecoderUnavailable, MemoryError) as error:
            return Postponed(f"its picture could not be decoded: {error}", _UNREAD)
        except OSError as error:  # of this machine, no fault of the picture's
            self._blobs.note_no_room(MAX_BYTES)
            return Postponed(f"there was nowhere to keep its picture: {error}", _UNREAD)
        except Exception as error:
            return error

    def _see(
        self, given: Mapping[str, Any], picture: Image.Image, mask: Image.Image | None
    ) -> Seen:
        """What the pipeline needs of a picture: little of a large one, which can go."""
        fit = {"fit": given["fit"]} if "fit" in given else {}
        return self._pipeline.preprocess(GenerationRequest(image=picture, mask=mask, **fit)).image

    def _on_device(
        self,
        members: list[BatchMember],
        has_begun: Callable[[], None],
        has_left: Callable[[], None],
    ) -> None:
        self.device_is_idle.clear()
        self.on_device = tuple(member.leased for member in members)
        # A task that was given back may have killed its worker. It is worked on alone, so that it
        # cannot take the next one down with it, again and again.
        if not any(member.leased.is_suspect for member in members):
            has_begun()
        started = time.perf_counter()
        try:
            with logged_together([member.leased for member in members]), self._previewed(members):
                self._generate(members)
            self.device_is_idle.set()
            has_left()
        except DeviceError:
            self.stop()  # before the next group, which waits for this very thread, gets its turn
            raise
        finally:
            self.on_device = ()
            self._caches.update(self._pipeline.cache_stats())
        took_s = time.perf_counter() - started
        images = sum(member.request.num_images for member in members)
        for member in members:
            member.leased.note("inference", took_s)
            member.leased.costs_s.append(took_s * member.request.num_images / images)

    @contextmanager
    def _previewed(self, members: list[BatchMember]) -> Iterator[None]:
        """Let previews of ``members`` be stored meanwhile."""
        if self._previews is None:
            yield
            return
        for member in members:
            self._previews.begin(member.leased.task)
        try:
            yield
        finally:
            for member in members:
                self._previews.end(member.leased.task)

    def _generate(self, members: list[BatchMember]) -> None:
        """Give every member its end. A group that fails is tried again in halves, down to one."""
        members = [member for member in members if self._may_begin(member)]
        if not members:
            return
        try:
            self._drive(members)
        except DeviceError:
            raise
        except Exception as error:
            if len(members) == 1:
                members[0].end = error
            else:
                _log.warning("a batch failed and is tried in halves", exc_info=error)
        # Not within the except clause: the error holds what its frames do, tensors too.
        rest = [member for member in members if member.end is None]
        if rest:
            half = (len(rest) + 1) // 2
            self._generate(rest[:half])
            self._generate(rest[half:])

    def _drive(self, members: list[BatchMember]) -> None:
        """Run the pipeline until each member has its end, or nobody wants those that have none."""
        requests = [member.request for member in members]
        images = sum(each.num_images for each in requests)
        metrics.BATCH_SIZE.observe(images)
        first = requests[0]  # they are of one size
        shape = first.width, first.height, bool(first.prompt), images
        with (
            self.watchdog.watching(shape, first.width * first.height * images),
            closing(self._pipeline.generate_batch(requests)) as events,
        ):
            for index, event in events:
                self.watchdog.step()
                member = members[index]
                if isinstance(event, Progress):
                    member.leased.step = event.step
                    if self._previews is not None and member.end is None:
                        self._previews.offer(member.leased.task, event)
                elif member.end is None:
                    member.end = event
                # In a batch, the images of a task that is dropped are made nevertheless.
                if not any([_is_wanted(each) for each in members]):
                    return
        raise RuntimeError("the pipeline ended without a result")

    def _may_begin(self, member: BatchMember) -> bool:
        if self._stopping.is_set():
            member.end = Abandoned("the worker is stopping")
        return _is_wanted(member)

    def _end(self, member: BatchMember) -> Outcome | Postponed | None:
        try:
            with member.leased.logged():
                if isinstance(member.end, Result):
                    return self._store_images(member, member.end)
                raise member.end or RuntimeError("the pipeline ended without a result")
        except Exception as error:
            if not isinstance(error, Postponed):  # of those the next attempt deletes them
                self._delete_images(member.leased)
            return _outcome_of(member.leased, error)

    def _delete_images(self, leased: LeasedTask) -> None:
        """Of a task that ends, or goes on, without them."""
        if leased.kept_bytes and self._blobs.delete(f"{leased.task.id}/{leased.task.attempt}"):
            leased.kept_bytes = 0

    def _delete_earlier_images(self, leased: LeasedTask) -> None:
        """Of attempts that ended in the middle, if there were any."""
        for attempt in range(1, leased.task.attempt):
            if not self._blobs.delete(f"{leased.task.id}/{attempt}"):
                leased.kept_bytes = None

    def _store_images(self, member: BatchMember, result: Result) -> Outcome:
        leased, task = member.leased, member.leased.task
        for stage, seconds in result.timings.items():
            leased.note(stage.removesuffix("_s"), seconds)
        metrics.STEPS.labels(result.quality, "computed").inc(result.computed_steps)
        metrics.STEPS.labels(result.quality, "reused").inc(result.reused_steps)
        flags = (False,) * len(result.images)
        if self._force_safety or task.input["enable_safety_checker"]:
            with leased.timed("safety"):
                flags = self._safety.check(result.images)
        keys, kind = [], task.input.get("output_format", "png")
        with leased.timed("store"):
            for i, image in enumerate(black_out(result.images, flags)):
                key = f"{task.id}/{task.attempt}/{i}.{kind}"
                made = provenance(
                    self._pipeline.info,
                    member.request,
                    seed=result.seeds[i],
                    quality=result.quality,
                )
                data = encode(image, made, kind)
                self._blobs.put(key, data, check_wanted=leased.check_wanted)
                leased.keep(len(data) + FILE_BYTES)
                keys.append(key)
        return Outcome(
            status=Status.COMPLETED,
            outputs=keys,
            has_nsfw_contents=list(flags),
            seeds=list(result.seeds),
            timings=leased.timings,
            quality=result.quality,
            reused_steps=result.reused_steps,
        )


def _is_wanted(member: BatchMember) -> bool:
    """Whether its end is still to come; one that nobody waits for any more gets it here."""
    if member.end is None:
        try:
            member.leased.check_wanted()
        except (Abandoned, Cancelled) as error:
            member.end = error
    return member.end is None


def _outcome_of(leased: LeasedTask, error: Exception) -> Outcome | Postponed | None:
    """What a task's owner is told of ``error``; none where the task has not ended."""
    with leased.logged():
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
            case OSError() if is_full(error):
                return Postponed(f"this machine's disk is full: {error}")
        _log.error("task failed", exc_info=error)
        return Outcome.failure(
            Code.INTERNAL, "The worker could not make this image; its log says why."
        )
