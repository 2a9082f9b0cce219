"""One task from claim to end, lanes side by side, and what happens when something goes away."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
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
from redux_pipelines.errors import RequestError
from redux_pipelines.fake import FakePipeline
from redux_server.net.guard import FetchError
from redux_server.pictures.decode import DecodeError
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Status
from redux_server.worker import leased
from redux_server.worker import loop as worker_module
from redux_server.worker.inputs import ImageGone
from server.worker_bench import OTHER, Bench, GatedPipeline, Images, Safety


class BrokenPipeline:
    """Does as it is told, which is not what a pipeline should."""

    info = ModelInfo(name="broken", backend="fake", device="cpu", dtype="uint8", size_multiple=1)

    def __init__(self, *events: Progress | Result | Exception) -> None:
        self.events = events

    def cache_stats(self) -> dict[str, CacheStats]:
        return {}

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> Iterator[BatchEvent]:
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            yield 0, event


def ended(reason: str = "", status: str = "completed") -> float:
    return REGISTRY.get_sample_value(
        "flux_redux_tasks_total", {"status": status, "reason": reason}
    ) or 0.0  # fmt: skip


# --- one task -------------------------------------------------------------------------------------


def test_task_is_completed_with_its_images_stored(bench: Bench) -> None:
    task = bench.done(parameters={"num_images": 3, "seed": 40})
    assert task.status is Status.COMPLETED
    outcome = task.outcome
    assert outcome is not None
    assert outcome.outputs == [f"{task.id}/1/{place}.png" for place in range(3)]
    assert outcome.has_nsfw_contents == [False, False, False]
    assert outcome.seeds == [40, 41, 42]
    assert (outcome.error, outcome.code) == ("", 0)
    for key, seed in zip(outcome.outputs, outcome.seeds, strict=True):
        image = bench.picture(key)
        assert (image.format, image.size) == ("PNG", (512, 520))
        assert image.info["Seed"] == str(seed)


def test_times_of_all_stages_are_noted_in_whole_milliseconds(bench: Bench) -> None:
    outcome = bench.done().outcome
    assert outcome is not None
    stages = {"fetch", "inference", "encode", "denoise", "decode", "safety", "store"}
    assert set(outcome.timings) == stages
    assert all(type(value) is int and value >= 0 for value in outcome.timings.values())


def test_parameters_reach_the_pipeline_unchanged(bench: Bench) -> None:
    seen = []

    class Noting(FakePipeline):
        def generate_batch(self, requests: Sequence[GenerationRequest]) -> Any:
            seen.extend(requests)
            return super().generate_batch(requests)

    given = {
        "prompt": "a fox",
        "size": "1536*512",
        "seed": 9_999_999_999,
        "num_inference_steps": 5,
        "guidance_scale": 7.25,
        "num_images": 2,
    }
    bench.done(parameters=given, pipeline=Noting())
    (request,) = seen
    assert (request.width, request.height) == (1536, 512)
    assert {name: getattr(request, name) for name in given if name != "size"} == {
        name: value for name, value in given.items() if name != "size"
    }
    assert request.empty_prompt == "zeros"


def counted(quality: str, how: str) -> float:
    labels = {"quality": quality, "how": how}
    return REGISTRY.get_sample_value("flux_redux_steps_total", labels) or 0.0


class Sparing(FakePipeline):
    """Says that it reused one step of each request."""

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> Any:
        for place, event in super().generate_batch(requests):
            if isinstance(event, Result):
                event = replace(event, computed_steps=event.computed_steps - 1, reused_steps=1)
            yield place, event


def test_quality_reaches_the_pipeline_and_what_it_did_is_told(bench: Bench) -> None:
    before = {how: counted("fast", how) for how in ("computed", "reused")}
    outcome = bench.done(parameters={"quality": "fast"}, pipeline=Sparing()).outcome
    assert outcome is not None
    assert (outcome.quality, outcome.reused_steps) == ("fast", 1)
    assert bench.picture(outcome.outputs[0]).info["Quality"] == "fast"
    assert counted("fast", "computed") - before["computed"] == 2
    assert counted("fast", "reused") - before["reused"] == 1


def test_without_a_quality_the_pipelines_own_is_used(bench: Bench) -> None:
    outcome = bench.done(pipeline=FakePipeline(quality="balanced")).outcome
    assert outcome is not None
    assert outcome.quality == "balanced"


def test_image_is_loaded_from_the_reference_of_the_task(bench: Bench) -> None:
    images = Images()
    bench.done(images=images, parameters={"image": "blob:abc/input"})
    assert images.loaded == ["blob:abc/input"]


def test_png_tells_model_seed_and_settings_but_not_the_prompt(bench: Bench) -> None:
    outcome = bench.done(parameters={"prompt": "a private wish"}).outcome
    assert outcome is not None
    info = bench.picture(outcome.outputs[0]).info
    assert info["Model"] == "fake (fake, uint8)"
    assert (info["Seed"], info["Steps"], info["Guidance"]) == ("7", "3", "3.5")
    assert info["AI-Generated"] == "true"
    assert "private" not in str(info)


def test_progress_is_recorded_by_the_heartbeat(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline)
    task_id = bench.submit(num_inference_steps=5)
    with bench.beside(worker.step):
        assert pipeline.is_running.wait(10)
        pipeline.gate.release(2)
        wait_until(lambda: worker._held[task_id].step == 2, 10)
        worker._renew()
        assert bench.task(task_id).progress_step == 2
        pipeline.open()
    assert bench.task(task_id).status is Status.COMPLETED


def test_second_attempt_writes_beside_the_first(bench: Bench) -> None:
    task_id = bench.submit()
    bench.store.claim(OTHER)
    bench.store.release(OTHER)
    assert bench.worker().step()
    outcome = bench.task(task_id).outcome
    assert outcome is not None
    assert outcome.outputs == [f"{task_id}/2/0.png"]


# --- safety ---------------------------------------------------------------------------------------


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


# --- failures -------------------------------------------------------------------------------------


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


def test_worker_lives_on_after_a_failed_task(bench: Bench) -> None:
    worker = bench.worker(pipeline=FakePipeline(fail_on="fox"))
    bad, good = bench.submit(prompt="fox"), bench.submit(prompt="hen")
    assert worker.step() and worker.step()
    assert bench.task(bad).status is Status.FAILED
    assert bench.task(good).status is Status.COMPLETED
    assert worker._held == {}


# --- leases ---------------------------------------------------------------------------------------


def test_lost_lease_abandons_the_task_at_the_next_step(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline)
    task_id = bench.submit(num_inference_steps=50)
    with bench.beside(worker.step):
        assert pipeline.is_running.wait(10)
        bench.clock.now += 31
        assert bench.store.claim(OTHER)
        worker._renew()
        pipeline.gate.release()  # one step more, at which it must notice
    assert pipeline.closed == 1, "the generator was left hanging"
    task = bench.task(task_id)
    assert (task.status, task.attempt) == (Status.PROCESSING, 2)
    with pytest.raises(FileNotFoundError):
        bench.blobs.get(f"{task_id}/1/0.png")


def test_result_that_comes_too_late_is_dropped(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline)
    task_id = bench.submit(num_inference_steps=1)
    fenced = REGISTRY.get_sample_value("flux_redux_fenced_finishes_total") or 0
    with bench.beside(worker.step):
        assert pipeline.is_running.wait(10)
        bench.clock.now += 31
        assert bench.store.claim(OTHER)
        pipeline.open()  # no heartbeat came between: it finishes without knowing
    assert bench.task(task_id).outcome is None
    assert REGISTRY.get_sample_value("flux_redux_fenced_finishes_total") == fenced + 1


def test_task_that_a_frozen_worker_takes_from_itself_is_kept_by_the_new_lane(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline)
    task_id = bench.submit(num_inference_steps=50)
    with bench.beside(worker.step):
        assert pipeline.is_running.wait(10)
        first = worker._held[task_id]
        bench.clock.now += 31  # the whole process slept: no heartbeat
        with bench.beside(worker.step):
            wait_until(lambda: worker._held[task_id] is not first, 10)
            assert first.is_lost, "two lanes would work on one task"
            worker._renew()
            assert not worker._held[task_id].is_lost
            pipeline.gate.release()
            wait_until(lambda: pipeline.closed == 1, 10)
            assert task_id in worker._held, "the first lane took the second's lease with it"
            pipeline.open()
    task = bench.task(task_id)
    assert (task.status, task.attempt) == (Status.COMPLETED, 2)
    assert worker._held == {}


def test_redelivered_task_is_counted(bench: Bench) -> None:
    before = REGISTRY.get_sample_value("flux_redux_redeliveries_total") or 0
    bench.submit()
    bench.store.claim(OTHER)
    bench.store.release(OTHER)
    assert bench.worker().step()
    assert REGISTRY.get_sample_value("flux_redux_redeliveries_total") == before + 1


class Unreliable:
    """The store, but ``method`` fails the first ``times``."""

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


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the worker's ``time.sleep`` was asked for; it returns at once."""
    asked: list[float] = []
    names = ("time", "monotonic", "perf_counter")
    quick = SimpleNamespace(sleep=asked.append, **{name: getattr(time, name) for name in names})
    monkeypatch.setattr(leased, "time", quick)
    return asked


@pytest.mark.parametrize("failures", [1, 3])
def test_end_is_recorded_again_while_the_database_is_away(
    bench: Bench, pauses: list[float], failures: int
) -> None:
    store = Unreliable(bench.store, "finish", failures)
    assert bench.done(store=store).status is Status.COMPLETED
    assert pauses == [0.2, 1.0, 5.0][:failures]


def test_end_that_cannot_be_recorded_leaves_the_task_to_be_done_again(
    bench: Bench, pauses: list[float]
) -> None:
    task = bench.done(store=Unreliable(bench.store, "finish", 4))
    assert task.status is Status.PROCESSING
    bench.clock.now += 31
    (again,) = bench.store.claim(OTHER)
    assert (again.id, again.attempt) == (task.id, 2)


# --- cancelled and deleted ------------------------------------------------------------------------


def test_cancelled_task_stops_at_the_next_step_and_ends_as_cancelled(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline)
    task_id = bench.submit(num_inference_steps=50)
    before = ended("1403", "cancelled")
    with bench.beside(worker.step):
        assert pipeline.is_running.wait(10)
        bench.store.cancel(task_id, "key")
        worker._renew()
        pipeline.gate.release()  # one step more, at which it must notice
    assert pipeline.closed == 1, "the generator was left hanging"
    task = bench.task(task_id)
    assert task.status is Status.CANCELLED
    assert task.outcome is not None
    assert (task.outcome.code, task.outcome.outputs) == (1403, [])
    assert "cancelled" in task.outcome.error
    assert ended("1403", "cancelled") == before + 1
    assert worker._held == {}
    with pytest.raises(FileNotFoundError):
        bench.blobs.get(f"{task_id}/1/0.png")


def test_task_that_is_cancelled_before_its_turn_never_reaches_the_device(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline)
    running, next_up = bench.submit(), bench.submit()
    with bench.beside(worker.run):
        assert pipeline.is_running.wait(10)
        wait_until(lambda: bench.task(next_up).attempt == 1, 10)
        bench.store.cancel(next_up, "key")
        wait_until(lambda: worker._held[next_up].is_cancelled, 10)
        pipeline.open()
        wait_until(lambda: bench.task(next_up).status.is_terminal, 10)
        worker.stop()
    assert bench.task(running).status is Status.COMPLETED
    assert bench.task(next_up).status is Status.CANCELLED
    assert pipeline.closed == 1, "both were on the device"


def test_deleted_task_stops_at_the_next_step_and_is_not_brought_back(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline)
    task_id = bench.submit(num_inference_steps=50)
    with bench.beside(worker.step):
        assert pipeline.is_running.wait(10)
        assert bench.store.delete([task_id], key_id="key") == [task_id]
        worker._renew()
        pipeline.gate.release()
    assert pipeline.closed == 1
    assert bench.store.get([task_id]) == [None]


# --- lanes ----------------------------------------------------------------------------------------


def test_next_picture_is_loaded_while_a_task_is_on_the_device(bench: Bench) -> None:
    pipeline, images = GatedPipeline(), Images()
    worker = bench.worker(pipeline=pipeline, images=images)
    tasks = [bench.submit(image=f"https://example.com/{name}") for name in "abcd"]
    with bench.beside(worker.run):
        wait_until(lambda: len(images.loaded) == 2, 10)
        assert pipeline.is_running.wait(10)
        time.sleep(0.1)
        assert images.loaded == ["https://example.com/a", "https://example.com/b"]
        assert [bench.task(task_id).attempt for task_id in tasks] == [1, 1, 0, 0], (
            "more than one task waiting for the device keeps it from other workers"
        )
        pipeline.open()
        wait_until(lambda: bench.task(tasks[-1]).status is Status.COMPLETED, 10)
        worker.stop()
    assert [bench.task(task_id).status for task_id in tasks] == [Status.COMPLETED] * 4


class WatchedPipeline(FakePipeline):
    """Notes on which threads it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[str] = []

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> Any:
        for event in super().generate_batch(requests):
            self.threads.append(threading.current_thread().name)
            yield event


def test_every_lane_runs_the_pipeline_on_the_one_device_thread(bench: Bench) -> None:
    pipeline = WatchedPipeline()
    worker = bench.worker(pipeline=pipeline)
    tasks = [bench.submit() for _ in range(6)]
    with bench.beside(worker.run):
        wait_until(lambda: bench.task(tasks[-1]).status is Status.COMPLETED, 20)
        worker.stop()
    assert len(pipeline.threads) >= 6
    assert set(pipeline.threads) == {"device_0"}


def test_stop_finishes_the_running_task_and_returns_the_next(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline)
    running, prefetched, waiting = (bench.submit() for _ in range(3))
    with bench.beside(worker.run) as thread:
        assert pipeline.is_running.wait(10)
        wait_until(lambda: bench.task(prefetched).attempt == 1, 10)
        worker.stop()
        time.sleep(0.1)
        assert thread.is_alive(), "did not wait for what is on the device"
        pipeline.open()
    assert bench.task(running).status is Status.COMPLETED
    assert (bench.store.queue_state().waiting, bench.store.queue_state().running) == (2, 0)
    claimed = [task for _ in range(2) for task in bench.store.claim(OTHER)]
    assert [task.id for task in claimed] == [prefetched, waiting], "lost its place"
    assert pipeline.closed == 1


def test_lease_is_renewed_while_stopping(bench: Bench) -> None:
    pipeline = GatedPipeline()
    worker = bench.worker(pipeline=pipeline)
    task_id = bench.submit()
    with bench.beside(worker.run):
        assert pipeline.is_running.wait(10)
        worker.stop()
        for _ in range(3):
            bench.clock.now += 20
            time.sleep(0.1)  # some heartbeats
        assert not bench.store.claim(OTHER), "was taken from a worker that lives"
        pipeline.open()
    assert bench.task(task_id).status is Status.COMPLETED


def test_stopped_worker_claims_nothing(bench: Bench) -> None:
    worker = bench.worker()
    worker.stop()
    bench.submit()
    assert not worker.step()
    assert bench.store.queue_state().waiting == 1


def test_run_leaves_no_thread_behind(bench: Bench) -> None:
    before = set(threading.enumerate())
    worker = bench.worker()
    with bench.beside(worker.run):
        worker.stop()
    assert set(threading.enumerate()) <= before


def test_wake_ends_the_wait_for_work(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "POLL_S", 60.0)
    worker = bench.worker()
    with bench.beside(worker.step):
        time.sleep(0.1)  # it finds nothing and waits
        task_id = bench.submit()
        worker.wake()
    assert bench.task(task_id).status is Status.COMPLETED


def test_lane_outlives_a_database_that_is_away(bench: Bench) -> None:
    store = Unreliable(bench.store, "claim", 3)
    worker = bench.worker(store=store)
    task_id = bench.submit()
    with bench.beside(worker.run):
        wait_until(lambda: bench.task(task_id).status is Status.COMPLETED, 10)
        worker.stop()
    assert store.failures_left == 0


def test_heartbeat_outlives_a_database_that_is_away(bench: Bench) -> None:
    pipeline = GatedPipeline()
    store = Unreliable(bench.store, "renew", 3)
    worker = bench.worker(store=store, pipeline=pipeline)
    task_id = bench.submit()
    with bench.beside(worker.run):
        assert pipeline.is_running.wait(10)
        wait_until(lambda: store.failures_left == 0, 10)
        pipeline.open()
        wait_until(lambda: bench.task(task_id).status is Status.COMPLETED, 10)
        worker.stop()
