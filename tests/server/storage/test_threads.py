"""Calls to the store of pictures have threads of their own, and a silent one costs nobody else."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from redux_server.storage.blobs import StorageError
from redux_server.storage.threads import MOST_AT_ONCE, THREADS, StorageThreads


class Silent:
    """A store that answers once it is told to."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.error: Exception | None = None

    def __call__(self, value: int = 0) -> int:
        assert self.answers.wait(20)
        if self.error is not None:
            raise self.error
        return value


@pytest.fixture
def silent() -> Iterator[Silent]:
    store = Silent()
    yield store
    store.answers.set()


async def refused(call: Any) -> str:
    with pytest.raises(StorageError) as caught:
        await call
    return str(caught.value)


def test_what_a_call_brings_or_raises_is_passed_on() -> None:
    async def use() -> None:
        threads = StorageThreads()
        assert await threads(int, "11", base=2) == 3
        with pytest.raises(FileExistsError):
            await threads(raising(FileExistsError()))
        names = await asyncio.gather(*(threads(thread_name) for _ in range(4)))
        assert all(name.startswith("storage") for name in names)
        threads.close()

    asyncio.run(use())


def raising(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def thread_name() -> str:
    return threading.current_thread().name


def test_a_silent_store_takes_no_thread_of_others(silent: Silent) -> None:
    async def use() -> None:
        threads = StorageThreads()
        calls = [asyncio.create_task(threads(silent)) for _ in range(MOST_AT_ONCE)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.to_thread(thread_name), 10)  # of keys, of tasks
        assert "does not answer" in await refused(threads(silent))  # and no line grows
        silent.answers.set()
        assert await asyncio.gather(*calls) == [0] * MOST_AT_ONCE
        assert await threads(silent, 7) == 7
        threads.close()

    assert MOST_AT_ONCE > THREADS
    asyncio.run(asyncio.wait_for(use(), 30))


def test_after_one_call_without_an_answer_others_are_refused_until_there_is_one(
    silent: Silent,
) -> None:
    async def use() -> None:
        threads = StorageThreads(patience_s=0.05)
        assert "has not answered within 0.05 s" in await refused(threads(silent))
        assert "does not answer" in await refused(threads(len, "ab"))  # while it is under way
        silent.error = StorageError("timed out")
        silent.answers.set()
        while threads._under_way:
            await asyncio.sleep(0.01)
        first = asyncio.create_task(threads(silent))  # one finds out
        await asyncio.sleep(0)
        await refused(threads(len, "ab"))
        assert "timed out" in await refused(first)
        silent.error = None
        assert await threads(silent, 5) == 5
        assert await asyncio.gather(threads(len, "ab"), threads(len, "abc")) == [2, 3]
        threads.close()

    asyncio.run(asyncio.wait_for(use(), 30))


def test_stopping_waits_for_no_store(silent: Silent) -> None:
    async def use() -> None:
        threads = StorageThreads(patience_s=0.05)
        await refused(threads(silent))
        threads.close()

    asyncio.run(asyncio.wait_for(use(), 10))
