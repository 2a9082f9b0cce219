"""Host and device: how far the one runs ahead of the other, and what time stages took.

A GPU computes what the host has queued; on a CPU the two are one.
"""

import time
from collections.abc import Iterable

import torch

from redux_pipelines.batching import Job


def fence_on(device: torch.device) -> torch.cuda.Event | None:
    """A mark on the device's queue to wait for; None on a CPU, where nothing is queued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class Clock:
    """Seconds per stage, given to jobs; waits for the device before reading the time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self, stage: str, jobs: Iterable[Job]) -> None:
        """Give each of ``jobs`` the time since the last lap."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        for job in jobs:
            job.spend(stage, now - self._last)
        self._last = now
