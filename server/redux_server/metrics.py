"""Prometheus metrics. Worker processes write theirs to a folder that the API process reads.

``redux_server.cli.main`` sets the folder up, which must come before this module is imported.
"""

from collections.abc import Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from redux_pipelines.contract.types import CacheStats

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)

TASKS = Counter("flux_redux_tasks", "Tasks ended, by how.", ["status", "reason"])
ACCEPTED = Counter("flux_redux_tasks_accepted", "Tasks accepted.")
REJECTED = Counter("flux_redux_rejected", "Requests refused.", ["reason"])
FENCED = Counter("flux_redux_fenced_finishes", "Results dropped because a later attempt exists.")
REDELIVERIES = Counter("flux_redux_redeliveries", "Tasks started again after a worker was lost.")
FETCH_BLOCKED = Counter("flux_redux_fetch_blocked", "Image URLs not fetched.", ["reason"])
WEBHOOK_DELIVERIES = Counter(
    "flux_redux_webhook_deliveries",
    "Tries to deliver a webhook: delivered, failed (comes again), given_up, dropped (no task).",
    ["result"],
)
QUEUED = Histogram("flux_redux_task_queue_seconds", "From accepting to starting.", buckets=_SECONDS)
INFERENCE = Histogram("flux_redux_task_inference_seconds", "On the device.", buckets=_SECONDS)
E2E = Histogram("flux_redux_task_e2e_seconds", "From accepting to the end.", buckets=_SECONDS)
STAGES = Histogram("flux_redux_stage_seconds", "Parts of a task.", ["stage"], buckets=_SECONDS)
BATCH_SIZE = Histogram(
    "flux_redux_batch_size",
    "Images of the tasks that went to the device together.",
    buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32),
)
STEPS = Counter(
    "flux_redux_steps", "Denoising steps, computed or spared by the step cache.", ["quality", "how"]
)
SYNC_ANSWERS = Counter(
    "flux_redux_sync_answers",
    "Requests of sync mode, by whether their task had ended when they were answered.",
    ["result"],
)
TICKETS = Counter("flux_redux_tickets", "Notes to workers that there is work.", ["result"])
CACHE_HITS = Counter("flux_redux_cache_hits", "Found in a worker's cache.", ["cache"])
CACHE_MISSES = Counter("flux_redux_cache_misses", "Not found in a worker's cache.", ["cache"])
CACHE_BYTES = Gauge(
    "flux_redux_cache_bytes",
    "Held by the workers' caches.",
    ["cache"],
    multiprocess_mode="livesum",
)
COMPILED = Gauge(
    "flux_redux_compiled_workers", "Workers that run compiled code.", multiprocess_mode="livesum"
)
COMPILE_FAILURES = Counter(
    "flux_redux_compile_failures", "Starts after which a worker runs without what it should have."
)
STREAMS = Gauge(
    "flux_redux_event_streams", "Streams that follow a task.", multiprocess_mode="livesum"
)
HTTP = Histogram(
    "flux_redux_http_request_duration_seconds",
    "Answers of the API.",
    ["method", "route", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)

Gauges = dict[tuple[str, str], float]


def count_end(status: str, code: int) -> None:
    """Count a task that ended; ``code`` (wire contract, `data.code`) says why unless completed."""
    TASKS.labels(status, "" if status == "completed" else str(code)).inc()


class CacheMeter:
    """Carries the counts that a pipeline's caches keep over to our metrics."""

    def __init__(self) -> None:
        self._last: dict[str, CacheStats] = {}

    def update(self, stats: Mapping[str, CacheStats]) -> None:
        """Count what happened since the last call."""
        for name, now in stats.items():
            before = self._last.get(name)
            CACHE_HITS.labels(name).inc(now.hits - (before.hits if before else 0))
            CACHE_MISSES.labels(name).inc(now.misses - (before.misses if before else 0))
            CACHE_BYTES.labels(name).set(now.size_bytes)
        self._last.update(stats)


class _Now(Collector):
    """Gauges that were read for this scrape."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Prometheus entry."""
        for (name, help_), value in self._gauges.items():
            yield GaugeMetricFamily(f"flux_redux_{name}", help_, value=value)


def serve(host: str, port: int) -> None:
    """Show this process's own metrics, from a thread: for a worker that no API process runs.

    Raises:
        OSError: it cannot listen there.
    """
    start_http_server(port, addr=host)


def exposition(gauges: Gauges) -> bytes:
    """All metrics in Prometheus' text format, ``gauges`` among them."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(_Now(gauges))
    return generate_latest(registry)
