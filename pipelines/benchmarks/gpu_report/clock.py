"""The time that a call takes: on the device by its events, on the host until all is queued.

Knows nothing of what is called.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

WARM_UP = 2


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(run: Callable[[], object], device: torch.device, count: int) -> dict[str, Any]:
    """Medians of ``count`` calls after a warm-up, each begun on an idle device.

    ``device_ms`` is between two events around the call, and so no less than ``host_ms``, which the
    host needs to queue it; None on a CPU, which has computed everything by then.
    """
    return alternating([run], device, count)[0]


def _once(run: Callable[[], object], device: torch.device) -> tuple[float | None, float]:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return None, 1000 * (time.perf_counter() - started)
    event: Any = torch.cuda.Event
    begin, end = (event(enable_timing=True) for _ in range(2))
    synchronize(device)
    started = time.perf_counter()
    begin.record(torch.cuda.current_stream(device))
    run()
    end.record(torch.cuda.current_stream(device))
    host_ms = 1000 * (time.perf_counter() - started)
    synchronize(device)
    return float(begin.elapsed_time(end)), host_ms


def alternating(
    runs: Sequence[Callable[[], object]], device: torch.device, count: int
) -> list[dict[str, Any]]:
    """``measure`` of each of ``runs``, call by call in turns: what disturbs falls on all."""
    for run in runs:
        for _ in range(min(WARM_UP, count)):
            run()
    taken: list[list[tuple[float | None, float]]] = [[] for _ in runs]
    for _ in range(count):
        for place, run in enumerate(runs):
            taken[place].append(_once(run, device))
    return [_medians(each) for each in taken]


def _medians(times: Sequence[tuple[float | None, float]]) -> dict[str, Any]:
    on_device = [device_ms for device_ms, _ in times if device_ms is not None]
    return {
        "device_ms": round(statistics.median(on_device), 4) if on_device else None,
        "host_ms": round(statistics.median(host_ms for _, host_ms in times), 4),
        "count": len(times),
    }


def milliseconds(timing: dict[str, Any]) -> float:
    """What a call takes: on the device where there is one."""
    device_ms = timing["device_ms"]
    return float(timing["host_ms"] if device_ms is None else device_ms)


def ratio(of: dict[str, Any], to: dict[str, Any]) -> float:
    """The time of one over the time of the other."""
    return round(milliseconds(of) / milliseconds(to), 4)
