"""One task from claim to end, lanes side by side, when a worker looks, and what may go away."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client import REGISTRY
from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError

from e2e.live import wait_until
from redux_pipelines.contract.types import (
    GenerationRequest,
    Result,
)
from redux_pipelines.fake import FakePipeline
from redux_server.database.tables import usage
from redux_server.storage.blobs import Blobs
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Status
from redux_server.worker import batch as batch_module
from redux_server.worker import loop as worker_module
from redux_server.worker.batch import BatchRunner
from redux_server.worker.loop import Worker
from redux_server.worker.prefetch import SLOW_OF_A_KEY
from redux_server.worker.watchdog import Watchdog
from server.worker_bench import (
    INPUT,
    OTHER,
    Bench,
    GatedPipeline,
    Images,
    Safety,
    UnreliableStore,
    ended,
)

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
        wait_until(lambda: worker._leased[task_id].step == 2, 10)
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


# --- failures -------------------------------------------------------------------------------------


def test_worker_lives_on_after_a_failed_task(bench: Bench) -> None:
    worker = bench.worker(pipeline=FakePipeline(fail_on="fox"))
    bad, good = bench.submit(prompt="fox"), bench.submit(prompt="hen")
    assert worker.step() and worker.step()
    assert bench.task(bad).status is Status.FAILED
    assert bench.task(good).status is Status.COMPLETED
    assert worker._leased == {}


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
        first = worker._leased[task_id]
        bench.clock.now += 31  # the whole process slept: no heartbeat
        with bench.beside(worker.step):
            wait_until(lambda: worker._leased[task_id] is not first, 10)
            assert first.is_lost, "two lanes would work on one task"
            worker._renew()
            assert not worker._leased[task_id].is_lost
            pipeline.gate.release()
            wait_until(lambda: pipeline.closed == 1, 10)
            assert task_id in worker._leased, "the first lane took the second's lease with it"
            pipeline.open()
    task = bench.task(task_id)
    assert (task.status, task.attempt) == (Status.COMPLETED, 2)
    assert worker._leased == {}


def test_redelivered_task_is_counted(bench: Bench) -> None:
    before = REGISTRY.get_sample_value("flux_redux_redeliveries_total") or 0
    bench.submit()
    bench.store.claim(OTHER)
    bench.store.release(OTHER)
    assert bench.worker().step()
    assert REGISTRY.get_sample_value("flux_redux_redeliveries_total") == before + 1


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
    assert worker._leased == {}
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
        wait_until(lambda: worker._leased[next_up].is_cancelled, 10)
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


class HeldImages(Images):
    """Does not load what is of the host "slow" before it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def load(self, reference: str, use: Callable[[Image.Image], Any]) -> Any:
        image = super().load(reference, use)
        if "slow" in reference:
            assert self.go_on.wait(20)
        return image


SLOW_URL = "https://slow.example/a.png"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle device waits for no picture."""
    monkeypatch.setattr(batch_module, "SLOW_S", 0.02)


def all_done(bench: Bench, tasks: Sequence[str]) -> bool:
    return all(bench.task(task).status is Status.COMPLETED for task in tasks)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("max_batch_size", [1, 4])
def test_pictures_that_do_not_come_keep_no_other_key_from_the_device(
    bench: Bench, max_batch_size: int
) -> None:
    images = HeldImages()
    worker = bench.worker(images=images, max_batch_size=max_batch_size)
    stuck = [bench.submit(image=SLOW_URL, key_id="slow", shape="s") for _ in range(20)]
    others = [bench.submit(key_id="other", shape="s") for _ in range(3)]
    with bench.beside(worker.run):
        wait_until(lambda: all_done(bench, others), 10)
        claimed = [bench.task(task).attempt for task in stuck]
        assert sum(claimed) < len(stuck), "one key has all places"
        images.go_on.set()
        wait_until(lambda: all_done(bench, stuck), 20)
        worker.stop()


@pytest.mark.usefixtures("impatient")
def test_pictures_of_one_key_that_come_slowly_are_fetched_side_by_side(bench: Bench) -> None:
    images = HeldImages()
    worker = bench.worker(images=images)
    stuck = [bench.submit(image=SLOW_URL, key_id="slow") for _ in range(6)]
    with bench.beside(worker.run):
        wait_until(lambda: len(images.loaded) == SLOW_OF_A_KEY, 10)
        time.sleep(0.1)
        assert len(images.loaded) == SLOW_OF_A_KEY
        images.go_on.set()
        wait_until(lambda: all_done(bench, stuck), 20)
        worker.stop()


def test_another_key_is_served_before_the_second_task_of_the_one_on_the_device(
    bench: Bench,
) -> None:
    pipeline, images = GatedPipeline(), Images()
    worker = bench.worker(pipeline=pipeline, images=images)
    flood = [bench.submit(key_id="flood", prompt=f"flood {number}") for number in range(3)]
    with bench.beside(worker.run):
        assert pipeline.is_running.wait(10)
        wait_until(lambda: bench.task(flood[1]).attempt == 1, 10)
        late = bench.submit(key_id="late", prompt="late")
        worker.wake()
        wait_until(lambda: len(images.loaded) == 3, 10)
        pipeline.open()
        wait_until(lambda: all_done(bench, [*flood, late]), 10)
        worker.stop()
    assert [request.prompt for request in pipeline.seen][:3] == ["flood 0", "late", "flood 1"]


def test_seconds_of_fetching_and_of_the_device_are_charged_to_the_key(
    bench: Bench, database: Engine
) -> None:
    class Slow(Images):
        def load(self, reference: str, use: Callable[[Image.Image], Any]) -> Any:
            time.sleep(0.05)
            return super().load(reference, use)

    bench.done(images=Slow())
    with database.connect() as db:
        seconds = db.scalar(select(usage.c.seconds).where(usage.c.key_id == "key"))
    assert seconds is not None and seconds >= 0.05
    assert seconds != 1.0, "what was charged at the claim is still there"


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
    store = UnreliableStore(bench.store, "claim", 3)
    worker = bench.worker(store=store)
    task_id = bench.submit()
    with bench.beside(worker.run):
        wait_until(lambda: bench.task(task_id).status is Status.COMPLETED, 10)
        worker.stop()
    assert store.failures_left == 0


def test_heartbeat_outlives_a_database_that_is_away(bench: Bench) -> None:
    pipeline = GatedPipeline()
    store = UnreliableStore(bench.store, "renew", 3)
    worker = bench.worker(store=store, pipeline=pipeline)
    task_id = bench.submit()
    with bench.beside(worker.run):
        assert pipeline.is_running.wait(10)
        wait_until(lambda: store.failures_left == 0, 10)
        pipeline.open()
        wait_until(lambda: bench.task(task_id).status is Status.COMPLETED, 10)
        worker.stop()


# --- looking for work -----------------------------------------------------------------------------


NEVER_S = 3600.0


class UnpolledBench:
    """A store, and workers that look only when they are told to."""

    def __init__(self, database: Engine, folder: Path) -> None:
        self.store = TaskStore(database)
        self.blobs = Blobs(folder)

    @contextmanager
    def running(self, **options: Any) -> Iterator[tuple[Worker, GatedPipeline]]:
        pipeline = GatedPipeline()
        given = {"poll_s": NEVER_S, "defer_s": NEVER_S, **options}
        runner = BatchRunner(images=Images(), pipeline=pipeline, safety=Safety(), blobs=self.blobs)
        worker = Worker("me", store=self.store, runner=runner, **given)
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            wait_until(lambda: worker.look(5.0), 10)
            yield worker, pipeline
        finally:
            pipeline.open()
            worker.stop()
            thread.join(10)
            assert not thread.is_alive()

    def accept(self, count: int = 1) -> None:
        self.store.accept([NewTask("k", "m", dict(INPUT)) for _ in range(count)], max_open=99)

    def counts(self) -> tuple[int, int]:
        state = self.store.queue_state()
        return state.waiting, state.running


@pytest.fixture
def unpolled(database: Engine, tmp_path: Path) -> UnpolledBench:
    return UnpolledBench(database, tmp_path / "blobs")


def test_a_look_finds_what_waits_and_returns_then(unpolled: UnpolledBench) -> None:
    with unpolled.running() as (worker, pipeline):
        assert worker.look(5.0)  # nothing there, and that is an answer too
        unpolled.accept()
        assert unpolled.counts() == (1, 0)
        assert worker.look(5.0)
        assert pipeline.is_running.wait(10)
        assert unpolled.counts() == (0, 1)


def test_a_worker_that_is_stopped_while_busy_claims_nothing_more_and_ends(
    unpolled: UnpolledBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its lanes waits for the device then, and is not to look once more."""
    stopped: list[bool] = []
    with unpolled.running() as (worker, pipeline):
        claim = unpolled.store.claim

        def noting(owner: str, **options: Any) -> Any:
            stopped.append(worker.is_stopping)
            return claim(owner, **options)

        monkeypatch.setattr(unpolled.store, "claim", noting)
        unpolled.accept(3)
        assert worker.look(5.0)
        assert pipeline.is_running.wait(10)
        assert unpolled.counts() == (2, 1)
        worker.stop()
        pipeline.open()
        wait_until(lambda: unpolled.counts()[1] == 0, 10)
    assert unpolled.counts() == (2, 0)
    assert stopped
    assert not any(stopped)


def test_a_worker_with_a_busy_device_does_not_look_and_says_so_at_once(
    unpolled: UnpolledBench,
) -> None:
    with unpolled.running() as (worker, pipeline):
        unpolled.accept()
        worker.wake()
        assert pipeline.is_running.wait(10)
        unpolled.accept()
        began = time.monotonic()
        assert not worker.look(60.0)
        assert time.monotonic() - began < 5
        assert unpolled.counts() == (1, 1)


def test_what_a_busy_worker_left_to_others_it_takes_when_its_device_is_free(
    unpolled: UnpolledBench,
) -> None:
    with unpolled.running() as (worker, pipeline):
        unpolled.accept(2)
        worker.wake()
        assert pipeline.is_running.wait(10)
        time.sleep(0.3)
        assert unpolled.counts() == (1, 1)
        pipeline.open()
        wait_until(lambda: unpolled.counts() == (0, 0), 20)  # nobody told it


def test_it_does_not_wait_for_others_for_ever(unpolled: UnpolledBench) -> None:
    with unpolled.running(defer_s=0.1) as (worker, pipeline):
        unpolled.accept(2)
        worker.wake()
        assert pipeline.is_running.wait(10)
        wait_until(lambda: unpolled.counts() == (0, 2), 20)


def test_a_stopped_worker_looks_no_more(unpolled: UnpolledBench) -> None:
    with unpolled.running() as (worker, _):
        worker.stop()
        unpolled.accept()
        assert worker.is_stopping
        assert not worker.look(0.2)
        assert unpolled.counts() == (1, 0)


@pytest.mark.parametrize("act", [Worker.wake, Worker.stop])
def test_nothing_of_this_needs_a_running_worker(
    unpolled: UnpolledBench, act: Callable[..., None]
) -> None:
    runner = BatchRunner(
        images=Images(), pipeline=GatedPipeline(), safety=Safety(), blobs=unpolled.blobs
    )
    worker = Worker("me", store=unpolled.store, runner=runner)
    act(worker)
    assert not worker.look(0.1)


# --- a device that hangs --------------------------------------------------------------------------


class HangingPipeline(FakePipeline):
    """Its device makes no step of a request with the prompt "hang" until the test is over."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs = threading.Event()
        self.is_over = threading.Event()

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> Any:
        for event in super().generate_batch(requests):
            if requests[0].prompt == "hang":
                self.hangs.set()
                assert self.is_over.wait(30)
            yield event

    def open(self) -> None:
        self.is_over.set()


@contextmanager
def hanging(
    bench: Bench, *prompts: str, limit_s: float, **parts: Any
) -> Iterator[tuple[Worker, list[str], threading.Thread]]:
    """A worker that runs, its tasks, of which the first hangs, and its thread."""
    pipeline = HangingPipeline()
    worker = bench.worker(pipeline=pipeline, watchdog=Watchdog(limit_s=limit_s), **parts)
    ids = [bench.submit(prompt=prompt) for prompt in ("hang", *prompts)]
    try:
        with bench.beside(worker.run) as thread:
            assert pipeline.hangs.wait(20)
            yield worker, ids, thread
            worker.stop()
            thread.join(20)
    finally:
        pipeline.open()


def test_a_device_that_hangs_is_given_up_and_its_task_is_under_suspicion(bench: Bench) -> None:
    with hanging(bench, "next", limit_s=0.2) as (worker, (hung, waiting), thread):
        thread.join(20)
        assert not thread.is_alive()
        assert worker.is_stuck and "the device hangs" in str(worker.device_failure)
        assert not worker.is_alive()
    assert (bench.task(hung).crashes, bench.task(waiting).crashes) == (1, 0)
    assert (bench.store.queue_state().waiting, bench.store.queue_state().running) == (2, 0)


def test_a_task_that_hangs_again_and_again_fails_and_says_why(bench: Bench) -> None:
    task_id = bench.submit(prompt="hang")
    for _ in range(3):
        pipeline = HangingPipeline()
        worker = bench.worker(pipeline=pipeline, watchdog=Watchdog(limit_s=0.2))
        try:
            with bench.beside(worker.run) as thread:
                thread.join(20)
                assert not thread.is_alive()
        finally:
            pipeline.open()
    task = bench.task(task_id)
    assert task.status is Status.FAILED and task.outcome is not None
    assert "cost too many workers their device" in task.outcome.error
    assert "the device hangs: it made no step for" in task.outcome.error


def test_a_cancelled_task_ends_though_its_device_hangs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "CANCEL_PATIENCE_S", 0.1)
    with hanging(bench, limit_s=60) as (worker, (hung,), _):
        assert worker.is_alive()
        cancelled = bench.store.cancel(hung, "key")
        assert cancelled is not None and not cancelled.has_ended_it
        wait_until(lambda: bench.task(hung).status is Status.CANCELLED, 10)
        worker._runner._pipeline.open()


def test_a_stopped_worker_does_not_wait_for_a_device_that_hangs(bench: Bench) -> None:
    with hanging(bench, limit_s=60, drain_timeout_s=0.3) as (worker, (hung,), thread):
        worker.stop()
        thread.join(20)
        assert not thread.is_alive()
        assert worker.is_stuck and worker.device_failure is None
    assert bench.task(hung).crashes == 0
    assert bench.store.queue_state().waiting == 1


def test_a_worker_says_why_it_would_take_no_task(bench: Bench) -> None:
    store = UnreliableStore(bench.store, "claim", 1)
    worker = bench.worker(store=store)
    assert (worker.obstacle(), worker.is_alive()) == ("", True)
    bench.submit()
    with pytest.raises(OperationalError):
        worker.step()
    assert worker.obstacle() == "the database does not answer"
    assert worker.step()
    assert worker.obstacle() == ""
    worker._runner._blobs.note_failure(1)
    assert "store of pictures" in worker.obstacle()
    worker.stop()
    assert worker.obstacle() == "the worker is stopping"
