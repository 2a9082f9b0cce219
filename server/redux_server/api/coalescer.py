"""Many coroutines' calls, run as few batched calls on one thread.

Used twice: accepting tasks (one commit, hence one disk flush, for all that arrived meanwhile) and
reading them (one SELECT). An idle server runs each call at once; a busy one batches by itself.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


class Coalescer(Generic[A, B]):
    """Awaitable front of ``run``, which takes a batch and returns as many results, in order.

    Must be used from one event loop. An exception in ``run`` reaches every caller of its batch.
    """

    def __init__(
        self, run: Callable[[Sequence[A]], Sequence[B]], *, name: str, max_batch: int = 200
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._waiting: list[tuple[A, asyncio.Future[B]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._drain: asyncio.Task[None] | None = None

    async def __call__(self, item: A) -> B:
        """``run([item])[0]``, possibly in company."""
        future: asyncio.Future[B] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._drain is None:
            self._drain = asyncio.create_task(self._run_batches())
        return await future

    def close(self) -> None:
        """Stop the thread after its present batch."""
        self._thread.shutdown(wait=True)

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch = self._waiting[: self._max_batch]
                del self._waiting[: self._max_batch]
                items = [item for item, _ in batch]
                try:
                    results = await loop.run_in_executor(self._thread, self._run, items)
                    answered = list(zip(batch, results, strict=True))
                except Exception as error:
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
                else:
                    for (_, future), result in answered:
                        if not future.done():  # its caller may have gone away
                            future.set_result(result)
        finally:
            self._drain = None
