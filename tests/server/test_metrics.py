"""What caches count becomes metrics, each event once; workers report theirs over a pipe."""

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from redux_pipelines.contract.types import CacheStats
from redux_server import metrics
from redux_server.metrics import CacheMeter, WorkerReports


def value(name: str, cache: str) -> float:
    return REGISTRY.get_sample_value(f"flux_redux_cache_{name}", {"cache": cache}) or 0.0


def test_counts_of_a_cache_are_carried_over_once() -> None:
    meter = CacheMeter()
    meter.update({"books": CacheStats(hits=1, misses=3, entries=2, size_bytes=70, max_bytes=99)})
    meter.update({"books": CacheStats(hits=5, misses=4, entries=1, size_bytes=40, max_bytes=99)})
    meter.update({"books": CacheStats(hits=5, misses=4, entries=1, size_bytes=40, max_bytes=99)})
    assert value("hits_total", "books") == 5
    assert value("misses_total", "books") == 4
    assert value("bytes", "books") == 40


def test_pipelines_of_two_workers_in_one_process_are_added_up() -> None:
    stats = CacheStats(hits=0, misses=2, entries=2, size_bytes=10, max_bytes=99)
    for meter in (CacheMeter(), CacheMeter()):
        meter.update({"maps": stats})
    assert value("misses_total", "maps") == 4


# --- What workers report --------------------------------------------------------------------------

GAUGES: metrics.Gauges = {("database_up", "Whether it is."): 1.0}


def reported(**samples: float) -> bytes:
    """A report of cache hits, misses and bytes of a cache that nobody else uses."""
    names = {"hits": "cache_hits_total", "misses": "cache_misses_total", "size": "cache_bytes"}
    labels = {"cache": "reported"}
    found = [[f"flux_redux_{names[name]}", labels, value] for name, value in samples.items()]
    return json.dumps(found).encode() + b"\n"


def shown(workers: WorkerReports) -> dict[str, float]:
    """The samples of that cache in the exposition."""
    text = metrics.exposition(GAUGES, workers).decode()
    families = list(text_string_to_metric_families(text))
    assert all(family.name.startswith("flux_redux_") for family in families)
    return {
        sample.name.removeprefix("flux_redux_cache_"): sample.value
        for family in families
        for sample in family.samples
        if sample.labels == {"cache": "reported"}
    }


def test_workers_are_added_up_and_each_report_replaces_the_one_before() -> None:
    workers = WorkerReports()
    workers.receive("cuda:0", reported(hits=3, size=10))
    workers.receive("cuda:0", reported(hits=5, size=20))
    workers.receive("cuda:1", reported(hits=1, misses=2, size=7))
    assert shown(workers) == {"hits_total": 6, "misses_total": 2, "bytes": 27}


def test_of_workers_that_ended_counters_stay_and_gauges_go() -> None:
    workers = WorkerReports()
    for _ in range(50):
        workers.receive("cpu", reported(hits=2, size=10))
        workers.end("cpu")
    workers.end("cpu")
    assert shown(workers) == {"hits_total": 100}
    workers.receive("cpu", reported(hits=1, size=10))
    assert shown(workers) == {"hits_total": 101, "bytes": 10}
    assert len(workers.total()) == 2, "grows with the workers that there were"


@pytest.mark.parametrize("line", [b"", b"{", b"Loading weights\n", b"3", b"[[1]]", b"[[1, 2, 3]]"])
def test_what_is_no_report_is_refused_and_changes_nothing(line: bytes) -> None:
    workers = WorkerReports()
    workers.receive("cpu", reported(hits=2))
    with pytest.raises(ValueError):
        workers.receive("cpu", line)
    assert shown(workers) == {"hits_total": 2}


def test_a_report_has_all_kinds_of_metrics_and_the_sum_is_still_a_histogram() -> None:
    metrics.BATCH_SIZE.observe(3)
    own = REGISTRY.get_sample_value("flux_redux_batch_size_count")
    assert own is not None
    workers = WorkerReports()
    workers.receive("cpu", metrics.report())
    text = metrics.exposition(GAUGES, workers).decode()
    assert "_created" not in text
    [family] = [
        each
        for each in text_string_to_metric_families(text)
        if each.name == "flux_redux_batch_size"
    ]
    values = {(each.name, each.labels.get("le")): each.value for each in family.samples}
    assert values["flux_redux_batch_size_count", None] == 2 * own
    buckets = [value for (name, _), value in values.items() if name.endswith("_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == 2 * own


class Piped:
    """A reporter, and the end of its pipe at which nobody reads yet."""

    def __init__(self) -> None:
        self.end, start = os.pipe()
        self.reporter = metrics.Reporter(start, every_s=0.02)

    def hold_much(self) -> None:
        """Room for a whole report: nobody reads while it is written here, and after other tests of
        this process there is much to report.
        """
        fcntl.fcntl(self.end, fcntl.F_SETPIPE_SZ, 2**20)

    def line(self) -> bytes:
        found = b""
        while not found.endswith(b"\n"):
            assert select.select([self.end], [], [], 10)[0], "no report came"
            found += os.read(self.end, 1)
        return found


@pytest.fixture
def piped() -> Piped:
    return Piped()


def hits(line: bytes) -> float:
    """Those of that cache in a report."""
    workers = WorkerReports()
    workers.receive("cpu", line)
    return workers.total()["flux_redux_cache_hits_total", (("cache", "own"),)]


def test_a_reporter_writes_when_something_has_changed_and_at_the_end(piped: Piped) -> None:
    piped.hold_much()
    metrics.CACHE_HITS.labels("own").inc()
    piped.reporter.start()
    first = hits(piped.line())
    assert not select.select([piped.end], [], [], 0.3)[0], "wrote though nothing has changed"
    metrics.CACHE_HITS.labels("own").inc()
    assert hits(piped.line()) == first + 1
    piped.reporter.close()
    metrics.CACHE_HITS.labels("own").inc()
    piped.reporter.close()
    assert hits(piped.line()) == first + 2


def test_a_reader_that_does_not_read_keeps_nobody_and_gets_whole_lines(piped: Piped) -> None:
    for _ in range(200):  # many times what a pipe holds
        metrics.CACHE_HITS.labels("own").inc()
        piped.reporter.close(patience_s=0.0)
    os.set_blocking(piped.end, False)
    left = b""
    with contextlib.suppress(BlockingIOError):
        while data := os.read(piped.end, 2**20):
            left += data
    piped.hold_much()
    lines = left.split(b"\n")
    assert all(hits(line) for line in lines[:-1])
    metrics.CACHE_HITS.labels("own").inc()
    piped.reporter.close()
    assert hits(lines[-1] + piped.line())


def test_a_reader_that_is_gone_is_no_fault(piped: Piped) -> None:
    os.close(piped.end)
    piped.reporter.close()
    piped.reporter.close()


def test_no_process_of_ours_keeps_its_metrics_in_mapped_files(tmp_path: Path) -> None:
    """Though a process manager's variable asks for it: a full disk would end it."""
    code = (
        "import sys; from redux_server.cli.main import run; code = run(['version']); "
        "from redux_server import metrics; metrics.ACCEPTED.inc(); sys.exit(code)"
    )
    names = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")
    environment = {**os.environ, **dict.fromkeys(names, str(tmp_path))}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
