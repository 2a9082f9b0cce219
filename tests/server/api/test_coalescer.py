"""Coalescer: many callers, few batches, one thread."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from redux_server.api.coalescer import Coalescer


class BatchFunction:
    """A batch function that notes its batches and threads and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.running = 0
        self.most_running = 0
        self.may_go = threading.Event()
        self.may_go.set()
        self.has_begun = threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.threads.add(threading.get_ident())
        self.batches.append(list(items))
        self.has_begun.set()
        assert self.may_go.wait(10)
        self.running -= 1
        if any(item < 0 for item in items):
            raise ValueError(f"negative in {list(items)}")
        return [item * 10 for item in items]

    async def has_a_batch(self) -> None:
        assert await asyncio.to_thread(self.has_begun.wait, 10)


Scenario = Callable[[BatchFunction, "Coalescer[int, int]"], Coroutine[Any, Any, None]]


def play(scenario: Scenario, *, max_batch: int = 200) -> BatchFunction:
    batch_function = BatchFunction()

    async def run() -> None:
        coalescer = Coalescer(batch_function, name="test", max_batch=max_batch)
        try:
            async with asyncio.timeout(20):
                await scenario(batch_function, coalescer)
        finally:
            batch_function.may_go.set()
            coalescer.close()

    asyncio.run(run())
    return batch_function


async def hold_up(
    batch_function: BatchFunction, coalescer: "Coalescer[int, int]"
) -> "asyncio.Task[int]":
    """Occupy the thread with a batch of its own, so that what follows has to wait."""
    batch_function.may_go.clear()
    first = asyncio.create_task(coalescer(0))
    await batch_function.has_a_batch()
    return first


def start(coalescer: "Coalescer[int, int]", items: Sequence[int]) -> "list[asyncio.Task[int]]":
    return [asyncio.create_task(coalescer(item)) for item in items]


def test_an_idle_coalescer_runs_a_call_at_once() -> None:
    async def scenario(batch_function: BatchFunction, coalescer: "Coalescer[int, int]") -> None:
        assert [await coalescer(1), await coalescer(2)] == [10, 20]

    assert play(scenario).batches == [[1], [2]]


def test_calls_that_arrive_meanwhile_share_a_batch_in_order() -> None:
    async def scenario(batch_function: BatchFunction, coalescer: "Coalescer[int, int]") -> None:
        first = await hold_up(batch_function, coalescer)
        rest = start(coalescer, range(1, 100))
        await asyncio.sleep(0)
        batch_function.may_go.set()
        assert await asyncio.gather(first, *rest) == [10 * item for item in range(100)]

    assert play(scenario).batches == [[0], list(range(1, 100))]


def test_a_batch_has_a_largest_size() -> None:
    async def scenario(batch_function: BatchFunction, coalescer: "Coalescer[int, int]") -> None:
        first = await hold_up(batch_function, coalescer)
        rest = start(coalescer, range(1, 8))
        await asyncio.sleep(0)
        batch_function.may_go.set()
        await asyncio.gather(first, *rest)

    assert play(scenario, max_batch=3).batches == [[0], [1, 2, 3], [4, 5, 6], [7]]


def test_an_exception_reaches_all_of_its_batch_and_only_it() -> None:
    async def scenario(batch_function: BatchFunction, coalescer: "Coalescer[int, int]") -> None:
        first = await hold_up(batch_function, coalescer)
        rest = start(coalescer, [1, -2, 3, 4, 5, 6])
        await asyncio.sleep(0)
        batch_function.may_go.set()
        results = await asyncio.gather(first, *rest, return_exceptions=True)
        assert [str(r) for r in results[1:4]] == ["negative in [1, -2, 3]"] * 3
        assert [results[0], *results[4:]] == [0, 40, 50, 60]
        assert await coalescer(7) == 70

    play(scenario, max_batch=3)


def test_a_wrong_number_of_results_is_an_error_and_not_silence() -> None:
    async def run() -> None:
        coalescer: Coalescer[int, int] = Coalescer(lambda _: [], name="test")
        try:
            with pytest.raises(ValueError, match="zip"):
                await asyncio.wait_for(coalescer(1), 10)
        finally:
            coalescer.close()

    asyncio.run(run())


def test_a_cancelled_caller_leaves_the_others_their_results() -> None:
    async def scenario(batch_function: BatchFunction, coalescer: "Coalescer[int, int]") -> None:
        first = await hold_up(batch_function, coalescer)
        rest = start(coalescer, [1, 2, 3])
        await asyncio.sleep(0)
        rest[1].cancel()
        first.cancel()  # even that of the running batch
        await asyncio.sleep(0)
        batch_function.may_go.set()
        assert await asyncio.gather(rest[0], rest[2]) == [10, 30]
        assert rest[1].cancelled() and first.cancelled()

    play(scenario)


def test_a_failing_batch_of_cancelled_callers_goes_by_in_silence() -> None:
    async def scenario(batch_function: BatchFunction, coalescer: "Coalescer[int, int]") -> None:
        batch_function.may_go.clear()
        [caller] = start(coalescer, [-1])
        await batch_function.has_a_batch()
        caller.cancel()
        await asyncio.sleep(0)
        batch_function.may_go.set()
        assert await coalescer(1) == 10

    play(scenario)


def test_batches_run_one_at_a_time_on_one_thread_that_is_not_the_loops() -> None:
    async def scenario(batch_function: BatchFunction, coalescer: "Coalescer[int, int]") -> None:
        for _ in range(20):
            await asyncio.gather(*start(coalescer, range(10)))

    batch_function = play(scenario, max_batch=3)
    assert batch_function.most_running == 1
    assert len(batch_function.threads) == 1
    assert threading.get_ident() not in batch_function.threads


def test_close_waits_for_the_running_batch_and_refuses_what_comes_later() -> None:
    async def scenario(batch_function: BatchFunction, coalescer: "Coalescer[int, int]") -> None:
        first = await hold_up(batch_function, coalescer)
        closing = asyncio.create_task(asyncio.to_thread(coalescer.close))
        await asyncio.sleep(0.05)
        assert not closing.done()
        batch_function.may_go.set()
        await closing
        assert await first == 0
        with pytest.raises(RuntimeError, match="shutdown"):
            await coalescer(1)

    assert play(scenario).batches == [[0]]
