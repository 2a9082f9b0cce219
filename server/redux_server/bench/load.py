"""When requests are sent: by clients that wait for their answer, or at times fixed beforehand.

A closed loop has N clients, each with one request open: it slows down with the server, and so it
never sees the queue that a stalled server leaves behind ("coordinated omission"). An open loop
sends at scheduled times whatever happens, and time counts from the schedule. Knows no HTTP: it is
given what runs one request. The clock is the running loop's.
"""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from redux_server.bench.task_client import NOT_SENT, UNFINISHED, Sample
from redux_server.bench.workload import Request

ARRIVALS = ("poisson", "gamma", "even")
MAX_OPEN = 1000
"""Tasks of one target that an open loop holds; an arrival beyond them is counted, not sent."""

Run = Callable[[Request, Sample], Awaitable[None]]
Recorded = Callable[[Sample], None]


def arrival_times(
    rate: float, count: int, arrivals: str, burstiness: float = 1.0, *, seed: int = 0
) -> list[float]:
    """Seconds from the start at which ``count`` requests come, ``rate`` a minute on average.

    ``poisson`` has gaps that are exponentially distributed, ``gamma`` gaps whose coefficient of
    variation is ``burstiness`` (1 is Poisson, more comes in bursts), ``even`` equal ones.
    """
    mean_s, rng = 60 / rate, random.Random(seed)
    shape = 1.0 if arrivals == "poisson" else 1 / burstiness**2
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += mean_s if arrivals == "even" else rng.gammavariate(shape, mean_s / shape)
    return times


async def closed_loop(
    run: Run,
    requests: Iterable[Request],
    new_sample: Callable[[Request], Sample],
    recorded: Recorded,
    *,
    clients: int,
    ends_at: float = math.inf,
) -> None:
    """Have ``clients`` work off ``requests``; none is begun after ``ends_at`` of the clock."""
    loop = asyncio.get_running_loop()
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:
            if loop.time() >= ends_at:
                return
            await _one(run, request, new_sample(request), recorded)

    await _together(client() for _ in range(clients))


async def open_loop(
    run: Run,
    requests: Sequence[Request],
    times: Sequence[float],
    new_sample: Callable[[Request], Sample],
    recorded: Recorded,
    *,
    max_open: int = MAX_OPEN,
    goes_on: Callable[[], bool] = lambda: True,
) -> None:
    """Send each of ``requests`` at its time, seconds from now, and wait until all have ended.

    Stops sending as soon as ``goes_on`` denies it.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    async with asyncio.TaskGroup() as group:
        open_now: set[asyncio.Task[None]] = set()
        for request, due in zip(requests, times, strict=True):
            await asyncio.sleep(max(0.0, start + due - loop.time()))
            if not goes_on():
                return
            sample = new_sample(request)
            sample.scheduled_at = start + due
            if len(open_now) >= max_open:
                sample.sent_at = sample.ended_at = loop.time()
                sample.outcome, sample.detail = NOT_SENT, f"{max_open} tasks were open"
                recorded(sample)
                continue
            task = group.create_task(_one(run, request, sample, recorded))
            open_now.add(task)
            task.add_done_callback(open_now.discard)


async def _one(run: Run, request: Request, sample: Sample, recorded: Recorded) -> None:
    """Run one request; its sample is recorded however that ends."""
    try:
        await run(request, sample)
    except asyncio.CancelledError:
        sample.outcome = UNFINISHED
        raise
    finally:
        recorded(sample)


async def _together(clients: Iterator[Awaitable[None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(_awaited(client))


async def _awaited(client: Awaitable[None]) -> None:
    await client


def blocks(count: int, block: int) -> list[tuple[int, int]]:
    """``count`` requests as ``(first, how many)``, each block of about ``block``."""
    number = max(1, round(count / block))
    edges = [round(place * count / number) for place in range(number + 1)]
    return [(low, high - low) for low, high in pairwise(edges) if high > low]
