"""What a pipeline's caches count becomes metrics, each event once."""

from prometheus_client import REGISTRY

from redux_pipelines.contract.types import CacheStats
from redux_server.metrics import CacheMeter


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
