"""One request through the task API of an imitated hosted service, whatever goes wrong."""

import asyncio

import pytest

from redux_server.bench.measure import Unusable
from redux_server.bench.plan import Plan
from redux_server.bench.summary import errors_of
from redux_server.bench.task_client import Limits, Sample
from redux_server.bench.transport import NoAnswer
from server.bench import virtual
from server.bench.hosted import KEY, Hosted
from server.bench.runs import measured, run, target, workload


def only(hosted: Hosted, **options: object) -> Sample:
    _, seen = measured({"A": hosted}, images=1, options=options)
    (sample,) = seen.samples
    return sample


@pytest.mark.parametrize("mode", ["poll", "sync", "stream"])
def test_a_task_is_timed_in_each_mode(mode: str) -> None:
    hosted = Hosted(lambda _: 4.0, round_trip_s=0.0)
    sample = only(hosted, mode=mode)
    assert sample.outcome == "completed"
    assert sample.latency_s == pytest.approx(4.0, rel=0.05)
    assert sample.inference_s == 0.25
    assert (hosted.polls == 0) is (mode != "poll")
    assert sample.outputs == ["A/0-0.png"]


def test_polling_is_no_part_of_the_latency_and_is_told() -> None:
    """Whatever the interval: found on average half a pause later than it was done."""
    for poll_s in (0.1, 0.5, 1.0):
        _, seen = measured(
            {"A": Hosted(lambda rng: rng.uniform(5, 6), round_trip_s=0.0)},
            images=200,
            limits=Limits(poll_s=poll_s),
        )
        mean = sum(sample.latency_s or 0 for sample in seen.samples) / 200
        assert mean == pytest.approx(5.5, abs=0.06)
        lag = sum(sample.poll_lag_s for sample in seen.samples) / 200
        assert lag == pytest.approx(poll_s / 2, rel=0.1)


def test_the_hosted_limits_are_obeyed_and_counted() -> None:
    """The lowest level: ten images a minute; whoever asks for more is told when to come again."""
    hosted = Hosted(lambda _: 2.0, per_minute=10, retry_after_s=7)
    _, seen = measured({"A": hosted}, images=30, clients=3)
    assert errors_of(seen.samples) == {}
    assert len(hosted.submits) == 30, "a 429 took nothing, so each image is asked for once"
    counted = sum(sample.rate_limited for sample in seen.samples)
    assert counted == hosted.refused > 0
    assert sum(sample.held_back_s for sample in seen.samples) >= 7 * counted
    worst = max(sample.latency_s or 0 for sample in seen.samples)
    assert worst < 3, "a closed loop times the submit that was taken"


def test_an_open_loop_counts_the_time_that_it_was_held_back() -> None:
    hosted = Hosted(lambda _: 2.0, per_minute=10)
    _, seen = measured({"A": hosted}, images=20, rate=60, arrivals="even")
    assert max(sample.latency_s or 0 for sample in seen.samples) > 30


def test_a_wait_longer_than_the_task_may_take_is_an_error() -> None:
    hosted = Hosted(per_minute=1, retry_after_s=3600)
    _, seen = measured({"A": hosted}, images=2)
    assert errors_of(seen.samples) == {"http_429": 1}


@pytest.mark.parametrize("problem", ["500", "502", "503", "504", "lost"])
def test_an_uncertain_submit_is_never_sent_again_without_a_key(problem: str) -> None:
    hosted = Hosted(fail={0: problem})
    _, seen = measured({"A": hosted}, images=3)
    kind = "uncertain_submit" if problem == "lost" else f"http_{problem}"
    assert errors_of(seen.samples) == {kind: 1}
    assert hosted._attempts == 3, "three requests, three submits"


@pytest.mark.parametrize("problem", ["502", "503", "504", "lost"])
def test_with_an_idempotency_key_it_is_sent_again_and_makes_one_image(problem: str) -> None:
    hosted = Hosted(fail={0: problem}, has_idempotency=True)
    _, seen = measured({"A": hosted}, images=3)
    assert errors_of(seen.samples) == {}
    assert len(hosted.tasks) == 3, "none was made twice"
    assert sum(sample.repeats for sample in seen.samples) == 1
    keys = [task.key for task in hosted.tasks.values()]
    assert all(keys)
    assert len(set(keys)) == 3


def test_keys_for_repeats_are_only_sent_where_the_target_documents_them() -> None:
    hosted = Hosted()
    measured({"A": hosted}, images=2)
    assert [task.key for task in hosted.tasks.values()] == ["", ""]
    hosted = Hosted()
    measured({"A": hosted}, images=2, options={"idempotency": "yes"})
    assert all(task.key for task in hosted.tasks.values())
    hosted = Hosted(has_idempotency=True)
    measured({"A": hosted}, images=2, options={"idempotency": "no"})
    assert [task.key for task in hosted.tasks.values()] == ["", ""]


def test_a_gateway_that_gives_up_in_sync_mode_is_an_error_while_the_task_goes_on() -> None:
    hosted = Hosted(lambda _: 200.0, sync_gateway_s=100)
    sample = only(hosted, mode="sync")
    assert sample.outcome == "http_504"
    assert len(hosted.tasks) == 1, "and is not asked for again"


def test_the_same_with_a_key_finds_the_task_again() -> None:
    hosted = Hosted(lambda _: 200.0, sync_gateway_s=100, has_idempotency=True)
    sample = only(hosted, mode="sync")
    assert sample.outcome == "completed"
    assert len(hosted.tasks) == 1
    assert sample.latency_s == pytest.approx(200, rel=0.05)


def test_a_failed_task_is_an_error_whose_words_hold_no_key() -> None:
    sample = only(Hosted(fail={0: "task"}))
    assert (sample.outcome, sample.latency_s) == ("failed", None)
    assert sample.detail == "failed: out of luck, [key]"
    assert KEY not in only(Hosted(fail={0: "500"})).detail


def test_a_task_that_never_ends_is_given_up() -> None:
    _, seen = measured({"A": Hosted(lambda _: 1e6)}, images=1, limits=Limits(timeout_s=60))
    (sample,) = seen.samples
    assert sample.outcome == "timeout"
    assert 60 < sample.ended_at - sample.sent_at < 63


def test_a_connection_that_is_refused_was_no_submit() -> None:
    assert only(Hosted(fail={0: "refused"})).outcome == "unreachable"


def test_a_stopped_run_keeps_what_it_saw() -> None:
    plan = Plan(targets=[target("A")], workload=workload(), images=100, clients=5)
    hosted = Hosted(lambda _: 3.0)
    runner = virtual.run(run(plan, {"A": hosted}, stop_after_s=10))
    seen = runner.measurement
    assert seen.is_interrupted
    outcomes = [sample.outcome for sample in seen.samples]
    assert outcomes.count("completed") == 15
    assert outcomes.count("unfinished") == 5
    assert len(hosted.tasks) == 20
    assert sum(not sample.is_measured for sample in seen.samples) > 0, (
        "the cut is made all the same"
    )


def test_a_key_that_is_refused_stops_the_run_before_any_image() -> None:
    good, bad = Hosted(), Hosted(refuse_key=True)
    with pytest.raises(Unusable, match=r"B .*refuses the key in KEY \(HTTP 401\); nothing was"):
        measured({"A": good, "B": bad}, images=5)
    assert good.tasks == bad.tasks == {}


def test_a_target_that_has_no_balance_and_no_document_can_be_measured() -> None:
    class Bare(Hosted):
        async def answer(self, method: str, base: str, path: str, headers, body: bytes):  # type: ignore[no-untyped-def]
            if path in ("v3/balance", "openapi.json"):
                raise NoAnswer("the connection was cut")
            return await super().answer(method, base, path, headers, body)

    assert only(Bare()).outcome == "completed"


def test_arrivals_that_find_no_room_are_counted_and_not_sent() -> None:
    hosted = Hosted(lambda _: 12.0)
    _, seen = measured({"A": hosted}, images=1100, rate=60_000, arrivals="even")
    assert hosted.most_open == 1000
    outcomes = [sample.outcome for sample in seen.samples]
    assert (outcomes.count("completed"), outcomes.count("not_sent")) == (1000, 100)


def test_many_open_tasks_together_are_polled_no_faster_than_a_process_can() -> None:
    hosted = Hosted(lambda _: 8.0)
    measured({"A": hosted}, images=1000, rate=60_000, arrivals="even")
    assert hosted.polls < 450 * 10


def test_the_key_goes_to_the_target_only() -> None:
    """An output on another host is fetched without it, and a poll is never sent elsewhere."""

    class Elsewhere(Hosted):
        def told(self, task: object, base: str) -> dict[str, object]:
            return super().told(task, "http://elsewhere.test")  # type: ignore[arg-type]

        async def request(self, method: str, url: str, headers, body: bytes, timeout_s: float):  # type: ignore[no-untyped-def]
            assert "elsewhere" not in url or "Authorization" not in headers
            return await super().request(method, url, headers, body, timeout_s)

    assert only(Elsewhere()).outcome == "completed"


def test_virtual_time_passes_only_in_sleeps() -> None:
    async def sleep() -> float:
        await asyncio.gather(*(asyncio.sleep(each) for each in (1, 5000, 3)))
        return asyncio.get_running_loop().time()

    assert virtual.run(sleep()) == pytest.approx(5000, abs=0.01)
