"""Threads for what waits for the store of pictures, and for nothing else.

A bucket may be silent for a minute. What asks it must neither take the threads in which keys are
checked and tasks are looked for, nor let a line of requests grow behind it.
"""

import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from redux_server.storage.blobs import StorageError

THREADS = 16
MOST_AT_ONCE = 64
"""Of calls, those that wait for a thread counted."""
PATIENCE_S = 30.0
P = ParamSpec("P")
T = TypeVar("T")


class StorageThreads:
    """Runs calls to a store, a few at a time. For use from one event loop.

    After one that was not answered in ``patience_s`` others are refused at once, until one is
    answered again: one at a time is let through to find out.
    """

    def __init__(self, *, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="storage")
        self._under_way = 0
        self._is_silent = False

    async def __call__(self, function: Callable[P, T], /, *given: P.args, **named: P.kwargs) -> T:
        """``function(*given, **named)`` in one of the threads.

        What is not answered in time goes on there, and what it brings is dropped.

        Raises:
            StorageError: the store does not answer in time, or too many wait for it; else what
                ``function`` raises.
        """
        if self._under_way >= (1 if self._is_silent else MOST_AT_ONCE):
            raise StorageError(errno.EBUSY, "The store of pictures does not answer")
        call = self._pool.submit(function, *given, **named)
        self._under_way += 1
        future = asyncio.wrap_future(call)
        future.add_done_callback(self._note_end)
        try:
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(future)
        except TimeoutError:
            if future.done():
                raise
            self._is_silent = True
            text = f"The store of pictures has not answered within {self._patience_s:g} s"
            raise StorageError(errno.ETIMEDOUT, text) from None

    def close(self) -> None:
        """Begin nothing more; what is under way is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _note_end(self, future: "asyncio.Future[T]") -> None:
        self._under_way -= 1
        error = None if future.cancelled() else future.exception()
        if not isinstance(error, StorageError):  # one that was late says no more than we know
            self._is_silent = False
