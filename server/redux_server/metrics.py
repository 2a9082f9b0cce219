"""Prometheus metrics, in memory alone: a full disk must neither end nor falsify them.

A supervised worker reports its own over a pipe (``Reporter``); the API process adds them to its own
(``WorkerReports``). ``redux_server.cli.main`` sees to it that prometheus_client keeps no files.
"""

import json
import os
import select
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from redux_pipelines.contract.types import CacheStats

disable_created_metrics()  # type: ignore[no-untyped-call]
_PREFIX = "flux_redux_"
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
CACHE_BYTES = Gauge("flux_redux_cache_bytes", "Held by the workers' caches.", ["cache"])
COMPILED = Gauge("flux_redux_compiled_workers", "Workers that run compiled code.")
COMPILE_FAILURES = Counter(
    "flux_redux_compile_failures", "Starts after which a worker runs without what it should have."
)
STREAMS = Gauge("flux_redux_event_streams", "Streams that follow a task.")
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


# --- What workers report --------------------------------------------------------------------------

_Key = tuple[str, tuple[tuple[str, str], ...]]  # a sample's name and its labels
_Samples = dict[_Key, float]


def report() -> bytes:
    """All that this process has counted, as a line of JSON: ``[[name, labels, value], ...]``."""
    found = [
        [sample.name, sample.labels, sample.value]
        for family in REGISTRY.collect()
        if family.name.startswith(_PREFIX)
        for sample in family.samples
    ]
    return json.dumps(found, separators=(",", ":")).encode() + b"\n"


class Reporter:
    """Writes this process's metrics to a pipe: a line whenever they have changed, and at the end.

    ``descriptor`` is ours alone. A reader that does not read costs a worker nothing but its
    latest numbers: nothing here waits for it for longer than it is told.
    """

    def __init__(self, descriptor: int, *, every_s: float = 0.5) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._every_s = every_s
        self._lock = threading.Lock()
        self._last = self._rest = b""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Report from a thread of its own, until ``close``."""
        self._thread.start()

    def close(self, *, patience_s: float = 1.0) -> None:
        """Report once more; the reader has ``patience_s`` to take it."""
        self._ending.set()
        self._send(patience_s)

    def _run(self) -> None:
        while not self._ending.wait(self._every_s):
            self._send(0.0)

    def _send(self, patience_s: float) -> None:
        with self._lock:
            try:
                self._write(patience_s)  # a line that was cut is ended first
                now = report()
                if not self._rest and now != self._last:
                    self._last = self._rest = now
                    self._write(patience_s)
            except OSError:  # who reads has ended, and we soon will
                self._ending.set()

    def _write(self, patience_s: float) -> None:
        while self._rest:
            try:
                self._rest = self._rest[os.write(self._descriptor, self._rest) :]
            except BlockingIOError:
                if not select.select([], [self._descriptor], [], patience_s)[1]:
                    return


class WorkerReports:
    """What the workers of this server have counted. For use from any thread.

    Of a worker that has ended, counters stay (added up, so that they need no more room however many
    there were) and gauges go: it holds nothing any more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: dict[str, _Samples] = {}
        self._ended: defaultdict[_Key, float] = defaultdict(float)

    def receive(self, worker: str, line: bytes) -> None:
        """Take what ``worker`` reports.

        Raises:
            ValueError: it is no report.
        """
        try:
            samples = {
                (str(name), tuple(sorted(labels.items()))): float(value)
                for name, labels, value in json.loads(line)
            }
        except (TypeError, AttributeError):
            raise ValueError("no report of metrics") from None
        with self._lock:
            self._latest[worker] = samples

    def end(self, worker: str) -> None:
        """Note that ``worker`` has ended; another may come under its name."""
        gauges = {family.name for family in REGISTRY.collect() if family.type == "gauge"}
        with self._lock:
            for key, value in self._latest.pop(worker, {}).items():
                if key[0] not in gauges:
                    self._ended[key] += value

    def total(self) -> _Samples:
        """The sum over all workers that there are or were."""
        with self._lock:
            total = self._ended.copy()
            for samples in self._latest.values():
                for key, value in samples.items():
                    total[key] += value
        return total


class _Everyone(Collector):
    """This process's own metrics and those of its workers, added up."""

    def __init__(self, workers: WorkerReports) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        """Prometheus entry."""
        reported = self._workers.total()
        for family in REGISTRY.collect():
            if not family.name.startswith(_PREFIX):
                continue
            samples = {
                (each.name, tuple(sorted(each.labels.items()))): each.value
                for each in family.samples
            }
            names = _sample_names(family)
            # In the order of the report: a histogram's buckets stand together, the least first.
            for key in [key for key in reported if key[0] in names]:
                samples[key] = samples.get(key, 0.0) + reported[key]
            family.samples = []
            for (name, labels), value in samples.items():
                family.add_sample(name, dict(labels), value)
            yield family


def _sample_names(family: Metric) -> frozenset[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    return frozenset(family.name + end for end in suffixes.get(family.type, ("",)))


def exposition(gauges: Gauges, workers: WorkerReports) -> bytes:
    """All metrics in Prometheus' text format, ``gauges`` and those of ``workers`` among them."""
    registry = CollectorRegistry()
    registry.register(_Everyone(workers))
    registry.register(_Now(gauges))
    return generate_latest(registry)
