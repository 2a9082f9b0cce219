"""A group of tasks on the device: batches, the safety checker, failures, a device that is lost."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import structlog
from PIL import Image
from prometheus_client import REGISTRY
from sqlalchemy.exc import OperationalError

from e2e.live import wait_until
from redux_pipelines.contract.types import (
    BatchEvent,
    CacheStats,
    GenerationRequest,
    ModelInfo,
    Progress,
    Result,
)
from redux_pipelines.errors import DeviceError, DeviceMemoryError, OutputError, RequestError
from redux_pipelines.fake import FakePipeline
from redux_pipelines.loading.load import load_pipeline
from redux_server.net.guard import FetchError
from redux_server.pictures.decode import DecodeError, DecoderUnavailable
from redux_server.tasks.task import Status
from redux_server.worker import loop as worker_module
from redux_server.worker.inputs import ImageGone
from server.in_process import Clock
from server.worker_bench import (
    INPUT,
    OTHER,
    Bench,
    GatedPipeline,
    Images,
    Safety,
    ended,
)

SHAPE = "512*520/3//"


Failure = Callable[[list[str]], Exception | None]


class Noting(FakePipeline):
    """The fake pipeline, which notes the prompts of each batch, and fails as it is told."""

    def __init__(self, fail: Failure = lambda prompts: None) -> None:
        super().__init__(max_batch_size=8)
        self.fail = fail
        self.batches: list[list[str]] = []

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> Any:
        return self._noted(requests, super().generate_batch(requests))

    def _noted(
        self, requests: Sequence[GenerationRequest], events: Iterator[BatchEvent]
    ) -> Iterator[BatchEvent]:
        prompts = [request.prompt for request in requests]
        self.batches.append(prompts)
        error = self.fail(prompts)
        yield from [next(events) for _ in requests]  # one step
        if error is not None:
            raise error
        yield from events


def if_there(prompt: str, error: Exception) -> Failure:
    """Fail with ``error`` if ``prompt`` is in the batch."""
    return lambda prompts: error if prompt in prompts else None


def submit(bench: Bench, *prompts: str, **parameters: Any) -> list[str]:
    """A task of one shape for each prompt."""
    parameters = {"shape": SHAPE, **parameters}
    return [bench.submit(prompt=prompt, **parameters) for prompt in prompts]


def statuses(bench: Bench, tasks: Sequence[str]) -> str:
    """One letter for each: completed, failed, processing (or returned), new, x for cancelled."""
    letters = {Status.CANCELLED: "x", Status.CREATED: "n"}
    found = [bench.task(task).status for task in tasks]
    return "".join(letters.get(status, status.value[0]) for status in found)


def error_of(bench: Bench, task: str) -> str:
    outcome = bench.task(task).outcome
    assert outcome is not None
    return outcome.error


# --- who joins a batch ----------------------------------------------------------------------------


def test_tasks_of_one_shape_are_one_batch_and_each_gets_its_own_images(bench: Bench) -> None:
    pipeline = Noting()
    tasks = submit(bench, "a", "b", "c", num_images=2)
    assert bench.worker(pipeline=pipeline, max_batch_size=6).step()
    assert pipeline.batches == [["a", "b", "c"]]
    assert statuses(bench, tasks) == "ccc"
    for prompt, task in zip("abc", tasks, strict=True):
        outcome = bench.task(task).outcome
        assert outcome is not None
        assert outcome.outputs == [f"{task}/1/{place}.png" for place in range(2)]
        alone = GenerationRequest(
            Image.new("RGB", (32, 32), "gray"), prompt, width=512, height=520, seed=8
        )
        *_, result = FakePipeline().generate(alone)
        assert isinstance(result, Result)
        assert bench.picture(outcome.outputs[1]).tobytes() == result.images[0].tobytes()
        assert {"fetch", "inference", "denoise", "store"} <= set(outcome.timings)


def test_a_batch_holds_no_more_images_than_allowed_but_for_a_last_task(bench: Bench) -> None:
    pipeline = Noting()
    worker = bench.worker(pipeline=pipeline, max_batch_size=3)
    for number, prompt in ((1, "a"), (2, "b"), (1, "c"), (1, "d"), (4, "e"), (1, "f"), (4, "g")):
        submit(bench, prompt, num_images=number)
    while bench.store.queue_state().waiting:
        worker.step()
    assert pipeline.batches == [["a", "b"], ["c", "d", "e"], ["f", "g"]]


def test_by_default_every_task_is_alone(bench: Bench) -> None:
    pipeline = Noting()
    worker = bench.worker(pipeline=pipeline, batch_timeout_s=30)
    tasks = submit(bench, "a", "b")
    began = time.monotonic()
    assert worker.step() and worker.step()
    assert time.monotonic() - began < 20, "waited for others that must not join it"
    assert pipeline.batches == [["a"], ["b"]]
    assert statuses(bench, tasks) == "cc"


def test_other_shapes_and_tasks_without_one_do_not_join_a_batch(bench: Bench) -> None:
    pipeline = Noting()
    worker = bench.worker(pipeline=pipeline, max_batch_size=4)
    for shape, prompt in ((SHAPE, "a"), ("other", "b"), (SHAPE, "c"), ("", "d"), ("", "e")):
        submit(bench, prompt, shape=shape)
    while bench.store.queue_state().waiting:
        worker.step()
    assert sorted(map(tuple, pipeline.batches)) == [("a", "c"), ("b",), ("d",), ("e",)]


def test_what_may_have_killed_a_worker_is_alone(bench: Bench) -> None:
    pipeline = Noting()
    tasks = submit(bench, "a", "b")
    assert len(bench.store.claim(OTHER, 2)) == 2
    bench.store.release(OTHER)
    tasks += submit(bench, "c", "d")
    worker = bench.worker(pipeline=pipeline, max_batch_size=4)
    while bench.store.queue_state().waiting:
        worker.step()
    assert sorted(map(tuple, pipeline.batches)) == [("a",), ("b",), ("c", "d")]
    assert statuses(bench, tasks) == "cccc"


def test_tasks_that_cannot_be_denoised_together_are_taken_apart(bench: Bench) -> None:
    pipeline = Noting()
    tasks = submit(bench, "a", "", "b")  # by their shape alike, and yet not
    assert bench.worker(pipeline=pipeline, max_batch_size=4).step()
    assert statuses(bench, tasks) == "ccc"
    assert pipeline.batches == [["a"], [""], ["b"]]


def test_the_images_of_a_batch_are_counted(bench: Bench) -> None:
    def total() -> float:
        return REGISTRY.get_sample_value("flux_redux_batch_size_sum") or 0

    before = total()
    submit(bench, "a", "b", num_images=2)
    assert bench.worker(max_batch_size=4).step()
    assert total() - before == 4


def test_progress_of_each_is_recorded(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline, max_batch_size=3)
    tasks = submit(bench, "a", "b", num_images=1)
    with bench.beside(worker.step):
        assert pipeline.is_running.wait(10)
        pipeline.gate.release(4)  # one image after the other: three steps of one, one of the next
        wait_until(lambda: [leased.step for leased in worker._leased.values()] == [3, 0], 10)
        worker._renew()
        assert [bench.task(task).progress_step for task in tasks] == [3, 0]
        pipeline.open()
    assert statuses(bench, tasks) == "cc"


# --- waiting for others ---------------------------------------------------------------------------


def test_a_task_waits_for_others_as_long_as_it_is_told(bench: Bench) -> None:
    pipeline = Noting()
    worker = bench.worker(pipeline=pipeline, max_batch_size=2, batch_timeout_s=60)
    tasks = submit(bench, "a")
    with bench.beside(worker.step):
        wait_until(lambda: tasks[0] in worker._leased, 10)
        time.sleep(0.1)
        assert not pipeline.batches
        tasks += submit(bench, "other", shape="other")
        tasks += submit(bench, "b")
        worker.wake()  # and now that it is full it begins
    assert pipeline.batches == [["a", "b"]]
    assert statuses(bench, tasks) == "cnc"


def test_without_others_a_task_begins_when_its_time_is_up(bench: Bench) -> None:
    tasks = submit(bench, "a")
    began = time.monotonic()
    assert bench.worker(max_batch_size=2, batch_timeout_s=0.3).step()
    assert time.monotonic() - began >= 0.3
    assert statuses(bench, tasks) == "c"


def test_stop_ends_the_wait_for_others_and_returns_the_task(bench: Bench) -> None:
    worker = bench.worker(max_batch_size=2, batch_timeout_s=60)
    (task,) = submit(bench, "a")
    with bench.beside(worker.run):
        wait_until(lambda: task in worker._leased, 10)
        worker.stop()
    assert bench.store.queue_state().waiting == 1
    assert bench.task(task).crashes == 0


def test_a_database_that_goes_away_meanwhile_costs_no_more_than_the_others(bench: Bench) -> None:
    class Flaky:
        def __getattr__(self, name: str) -> Any:
            return getattr(bench.store, name)

        def claim(self, owner: str, n: int = 1, *, like: str = "", **how: Any) -> Any:
            if like:
                raise OperationalError("UPDATE tasks", {}, Exception("disk I/O error"))
            return bench.store.claim(owner, n, **how)

    tasks = submit(bench, "a", "b")
    worker = bench.worker(store=Flaky(), max_batch_size=2)
    assert worker.step() and worker.step()
    assert statuses(bench, tasks) == "cc"


# --- each ends for itself -------------------------------------------------------------------------


class Choosy(Images):
    """Has no picture for references that contain "bad"."""

    def load(self, reference: str, use: Callable[[Image.Image], Any]) -> Any:
        if "bad" in reference:
            raise FetchError("dns", "The host 'bad' has no usable address.")
        return super().load(reference, use)


def test_a_picture_that_cannot_be_had_fails_its_task_alone(bench: Bench) -> None:
    pipeline = Noting()
    tasks = submit(bench, "a") + submit(bench, "b", image="https://bad/") + submit(bench, "c")
    assert bench.worker(pipeline=pipeline, images=Choosy(), max_batch_size=3).step()
    assert pipeline.batches == [["a", "c"]]
    assert statuses(bench, tasks) == "cfc"
    assert error_of(bench, tasks[1]) == "The host 'bad' has no usable address."


def test_nothing_goes_to_the_device_when_no_picture_can_be_had(bench: Bench) -> None:
    pipeline = Noting()
    tasks = submit(bench, "a", "b", image="https://bad/")
    worker = bench.worker(pipeline=pipeline, images=Choosy(), max_batch_size=3)
    assert worker.step()
    assert (pipeline.batches, statuses(bench, tasks), worker._leased) == ([], "ff", {})


def test_pictures_of_a_batch_are_fetched_side_by_side(bench: Bench) -> None:
    everyone = threading.Barrier(3, timeout=20)

    class Meeting(Images):
        def load(self, reference: str, use: Callable[[Image.Image], Any]) -> Any:
            everyone.wait()  # breaks, and fails the task, if they come one after the other
            return super().load(reference, use)

    tasks = submit(bench, "a", "b", "c")
    assert bench.worker(images=Meeting(), max_batch_size=3).step()
    assert statuses(bench, tasks) == "ccc"


def test_a_task_that_breaks_the_pipeline_is_found_and_its_mates_complete(bench: Bench) -> None:
    pipeline = Noting(if_there("c", RuntimeError("a private reason")))
    tasks = submit(bench, "a", "b", "c", "d")
    with structlog.testing.capture_logs() as lines:
        assert bench.worker(pipeline=pipeline, max_batch_size=4).step()
    assert pipeline.batches == [["a", "b", "c", "d"], ["a", "b"], ["c", "d"], ["c"], ["d"]]
    assert statuses(bench, tasks) == "ccfc"
    assert error_of(bench, tasks[2]) == "The worker could not make this image; its log says why."
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["task failed"]


def test_what_spoils_one_request_fails_it_alone_with_its_reason(bench: Bench) -> None:
    class Spoiling(FakePipeline):
        def generate_batch(self, requests: Sequence[GenerationRequest]) -> Any:
            for place, event in super().generate_batch(requests):
                if isinstance(event, Result) and requests[place].prompt == "b":
                    event = OutputError("the model made numbers that are not finite")
                yield place, event

    tasks = submit(bench, "a", "b", "c")
    assert bench.worker(pipeline=Spoiling(), max_batch_size=3).step()
    assert statuses(bench, tasks) == "cfc"
    assert error_of(bench, tasks[1]) == "the model made numbers that are not finite"


def test_a_checker_that_breaks_fails_its_task_alone(bench: Bench) -> None:
    class Breaking:
        def __init__(self) -> None:
            self.calls = 0

        def check(self, images: Any) -> Any:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("no model")
            return (False,) * len(images)

    tasks = submit(bench, "a", "b")
    assert bench.worker(safety=Breaking(), max_batch_size=2).step()
    assert statuses(bench, tasks) == "fc"


def test_a_cancelled_task_of_a_batch_is_dropped_and_its_mates_complete(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline, max_batch_size=3)
    tasks = submit(bench, "a", "b", "c")
    with bench.beside(worker.step):
        assert pipeline.is_running.wait(10)
        bench.store.cancel(tasks[1], "key")
        worker._renew()
        pipeline.open()
    assert statuses(bench, tasks) == "cxc"
    with pytest.raises(FileNotFoundError):
        bench.blobs.get(f"{tasks[1]}/1/0.png")


def test_a_batch_that_nobody_wants_any_more_is_left_at_the_next_step(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline, max_batch_size=2)
    cancelled, lost = submit(bench, "a", "b", num_inference_steps=50)
    with bench.beside(worker.step):
        assert pipeline.is_running.wait(10)
        bench.store.cancel(cancelled, "key")
        bench.store.delete([lost])
        worker._renew()
        pipeline.gate.release()
    assert pipeline.closed == 1
    assert statuses(bench, [cancelled]) == "x"
    assert worker._leased == {}


# --- too little memory, and a device that is lost -------------------------------------------------


def test_a_task_that_does_not_fit_fails_clearly_and_the_worker_lives(bench: Bench) -> None:
    advice = "an image of 512 × 520 pixels does not fit: ask for a smaller one"
    pipeline = Noting(if_there("huge", DeviceMemoryError(advice)))
    worker = bench.worker(pipeline=pipeline, max_batch_size=2)
    tasks = submit(bench, "huge", "a", "b")
    assert worker.step() and worker.step()
    assert statuses(bench, tasks) == "fcc"
    assert error_of(bench, tasks[0]) == advice
    assert worker.device_failure is None


LOST = DeviceError("the device failed: CUDA error: device-side assert triggered")


def test_a_lost_device_ends_the_worker_and_returns_its_tasks_as_suspects(bench: Bench) -> None:
    pipeline = Noting(if_there("poison", LOST))
    worker = bench.worker(pipeline=pipeline, max_batch_size=2)
    tasks = submit(bench, "a", "poison", "b", "c")
    with bench.beside(worker.run):
        pass  # it ends by itself
    assert worker.device_failure is LOST
    assert pipeline.batches == [["a", "poison"]], "something was run on a lost device"
    assert (bench.store.queue_state().waiting, bench.store.queue_state().running) == (4, 0)
    assert [bench.task(task).crashes for task in tasks] == [1, 1, 0, 0]
    assert all(bench.task(task).outcome is None for task in tasks)


def test_a_poison_task_fails_after_three_devices_and_its_mates_complete(bench: Bench) -> None:
    pipeline = Noting(if_there("poison", LOST))
    tasks = submit(bench, "a", "poison", "b", "c")
    lost = 0
    while bench.store.queue_state().waiting:
        worker = bench.worker(pipeline=pipeline, max_batch_size=4)
        while bench.store.queue_state().waiting and worker.device_failure is None:
            worker.step()
        lost += worker.device_failure is not None
        assert lost <= 3
    assert lost == 3
    assert statuses(bench, tasks) == "cfcc"
    assert bench.task(tasks[1]).attempt == 3
    assert error_of(bench, tasks[1]) == (
        "This task cost too many workers their device. The last time: the device failed: "
        "CUDA error: device-side assert triggered"
    )
    assert pipeline.batches[0] == ["a", "poison", "b", "c"]
    assert all(len(batch) == 1 for batch in pipeline.batches[1:]), "a suspect was not alone"


def test_a_lane_that_hangs_does_not_keep_a_lost_device(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "LOST_DEVICE_GRACE_S", 0.2)
    hangs, go_on = threading.Event(), threading.Event()

    class Hanging(Images):
        def load(self, reference: str, use: Callable[[Image.Image], Any]) -> Any:
            if "slow" in reference:
                hangs.set()
                go_on.wait(30)
            return super().load(reference, use)

    class Failing(FakePipeline):
        def generate_batch(self, requests: Sequence[GenerationRequest]) -> Any:
            assert hangs.wait(20)
            yield 0, Progress(1, 3)
            raise LOST

    worker = bench.worker(pipeline=Failing(), images=Hanging())
    submit(bench, "a")
    submit(bench, "b", image="https://slow/")
    try:
        with bench.beside(worker.run):
            pass
        assert not go_on.is_set()
        assert bench.store.queue_state().waiting == 2
    finally:
        go_on.set()


# --- the safety checker ---------------------------------------------------------------------------


def test_flagged_image_is_black_and_the_others_are_kept(bench: Bench) -> None:
    outcome = bench.done(safety=Safety(1), parameters={"num_images": 3}).outcome
    assert outcome is not None
    assert outcome.status is Status.COMPLETED
    assert outcome.has_nsfw_contents == [False, True, False]
    pictures = [bench.picture(key) for key in outcome.outputs]
    assert [image.getextrema() == ((0, 0),) * 3 for image in pictures] == [False, True, False]
    assert {image.size for image in pictures} == {(512, 520)}


def test_checker_is_not_asked_when_the_caller_does_without(bench: Bench) -> None:
    safety = Safety(0)
    outcome = bench.done(safety=safety, parameters={"enable_safety_checker": False}).outcome
    assert outcome is not None
    assert outcome.has_nsfw_contents == [False]
    assert safety.checked == 0
    assert bench.picture(outcome.outputs[0]).getextrema() != ((0, 0),) * 3


def test_operator_can_force_the_checker(bench: Bench) -> None:
    parameters = {"enable_safety_checker": False}
    outcome = bench.done(safety=Safety(0), force_safety=True, parameters=parameters).outcome
    assert outcome is not None
    assert outcome.has_nsfw_contents == [True]
    assert bench.picture(outcome.outputs[0]).getextrema() == ((0, 0),) * 3


def test_checker_that_breaks_fails_the_task_and_shows_nothing(bench: Bench) -> None:
    class Broken:
        def check(self, images: Any) -> Any:
            raise RuntimeError("no model")

    task = bench.done(safety=Broken())
    assert task.status is Status.FAILED
    with pytest.raises(FileNotFoundError):
        bench.blobs.get(f"{task.id}/1/0.png")


# --- large pictures -------------------------------------------------------------------------------


class Large:
    """Loads a picture of six megapixels; of ten where it is a mask."""

    def load(self, reference: str, use: Callable[[Image.Image], Any]) -> Any:
        size = (4000, 2500) if "mask" in reference else (3000, 2000)
        return Image.linear_gradient("L").resize(size).convert("RGB")


@pytest.mark.parametrize("fit", ["squash", "letterbox", "center"])
def test_the_device_never_waits_for_a_large_picture(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fit: str
) -> None:
    """Of what is done to pixels on its thread, all is of the encoder's small square."""
    pipeline, pixels = load_pipeline(model="tiny", device="cpu"), {True: [0], False: [0]}

    def watch(name: str) -> None:
        real = getattr(Image.Image, name)

        def watched(image: Image.Image, *given: Any, **more: Any) -> Any:
            on_device = threading.current_thread().name.startswith("device")
            pixels[on_device].append(image.width * image.height)
            return real(image, *given, **more)

        monkeypatch.setattr(Image.Image, name, watched)

    for name in ("resize", "convert", "crop", "copy"):
        watch(name)
    asked = {"images": ["https://example.com/b.png"], "mask": "https://example.com/mask.png"}
    task = bench.done(pipeline=pipeline, images=Large(), parameters={"fit": fit, **asked})
    assert task.status is Status.COMPLETED
    assert max(pixels[False]) == 4000 * 2500
    assert max(pixels[True]) <= 512 * 576, "of the image that is made, before it is cropped"


# --- failures -------------------------------------------------------------------------------------


class BrokenPipeline:
    """Does as it is told, which is not what a pipeline should."""

    info = ModelInfo(name="broken", backend="fake", device="cpu", dtype="uint8", size_multiple=1)

    def __init__(self, *events: Progress | Result | Exception) -> None:
        self.events = events

    def cache_stats(self) -> dict[str, CacheStats]:
        return {}

    def preprocess(self, request: GenerationRequest) -> GenerationRequest:
        return request

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> Iterator[BatchEvent]:
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            yield 0, event


@pytest.mark.parametrize(
    "error",
    [
        FetchError("dns", "The host 'nowhere' has no usable address."),
        DecodeError("broken", "The PNG picture is damaged."),
        ImageGone("The input image is no longer kept by this server."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_picture_that_cannot_be_had_fails_the_task_with_its_reason(
    bench: Bench, error: Exception
) -> None:
    task = bench.done(images=Images(raises=error))
    assert task.status is Status.FAILED
    assert task.outcome is not None
    assert (task.outcome.code, task.outcome.error) == (1402, str(error))
    assert (task.outcome.outputs, task.outcome.has_nsfw_contents) == ([], [])


def test_what_the_pipeline_refuses_is_told(bench: Bench) -> None:
    task = bench.done(pipeline=BrokenPipeline(RequestError("the prompt has too many tokens")))
    assert task.outcome is not None
    assert (task.outcome.code, task.outcome.error) == (1403, "the prompt has too many tokens")


@pytest.mark.parametrize(
    ("pipeline", "private"),
    [
        (FakePipeline(fail_on="fox"), "told to fail on prompts"),
        (BrokenPipeline(MemoryError("17 GiB wanted")), "17 GiB wanted"),
        (BrokenPipeline(Progress(1, 3)), "without a result"),
        (BrokenPipeline(), "without a result"),
    ],
)
def test_broken_pipeline_fails_the_task_with_a_public_text_and_a_private_log(
    bench: Bench, pipeline: Any, private: str
) -> None:
    before = ended("5000", "failed")
    with structlog.testing.capture_logs() as lines:
        task = bench.done(pipeline=pipeline, parameters={"prompt": "a fox"})
    assert task.status is Status.FAILED
    assert task.outcome is not None
    assert task.outcome.code == 5000
    assert task.outcome.error == "The worker could not make this image; its log says why."
    (line,) = [line for line in lines if line["event"] == "task failed"]
    assert private in str(line["exc_info"])
    assert ended("5000", "failed") == before + 1


@pytest.mark.parametrize(
    "error",
    [DecoderUnavailable("a decoding process was killed (SIGKILL)"), MemoryError("no more")],
    ids=lambda error: type(error).__name__,
)
def test_a_picture_that_could_not_be_decoded_now_is_tried_later(
    bench: Bench, clock: Clock, error: Exception
) -> None:
    """A decoder that the kernel kills for want of memory says nothing about the picture."""
    (task,) = submit(bench, "a")
    bench.worker(images=Images(raises=error)).step()
    assert statuses(bench, [task]) == "p", "returned"
    clock.now += 60
    bench.worker().step()
    assert statuses(bench, [task]) == "c"


def test_what_is_kept_of_large_pictures_is_small(bench: Bench) -> None:
    """Of each only what the encoder sees, of a mask that there was one: until a turn comes."""
    kept: list[GenerationRequest] = []

    class Large(Images):
        def load(self, reference: str, use: Callable[[Image.Image], Any]) -> Any:
            return use(Image.new("RGB", (2000, 1500), "gray"))

    class Keeping(FakePipeline):
        def generate_batch(self, requests: Sequence[GenerationRequest]) -> Any:
            kept.extend(requests)
            return super().generate_batch(requests)

    url = INPUT["image"]
    parameters = {"images": [url, url], "mask": url}
    task = bench.done(images=Large(), pipeline=Keeping(), parameters=parameters)
    assert task.status is Status.COMPLETED
    [request] = kept
    assert request.mask is not None
    sizes = [each.pixels.size for each in request.pictures]  # type: ignore[union-attr]
    assert sizes == [(1, 1)] * 3 and request.mask.size == (1, 1)
