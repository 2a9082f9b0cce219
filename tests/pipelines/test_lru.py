"""A cache that stays within its bytes and forgets the oldest use first."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redux_pipelines.lru import LRU, CacheStats, digest, tensor_bytes


class Model:
    """The same cache, told in the plainest way: a list, the most recently used last."""

    def __init__(self, max_bytes):
        self.max_bytes = max_bytes
        self.entries = []
        self.hits = self.misses = 0

    def get(self, key, value):
        for entry in self.entries:
            if entry[0] == key:
                self.hits += 1
                self.entries.remove(entry)
                self.entries.append(entry)
                return entry[1]
        self.misses += 1
        if value <= self.max_bytes:
            self.entries.append((key, value))
            while sum(size for _, size in self.entries) > self.max_bytes:
                self.entries.pop(0)
        return value


@given(
    st.integers(0, 12),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 14)), max_size=60),
)
def test_it_is_a_list_ordered_by_last_use(max_bytes, calls):
    cache, model = LRU(max_bytes, int), Model(max_bytes)
    for key, size in calls:
        assert cache.get(key, lambda size=size: size) == model.get(key, size)
        size_bytes = sum(held for _, held in model.entries)
        assert size_bytes <= max_bytes
        assert cache.stats == CacheStats(
            model.hits, model.misses, len(model.entries), size_bytes, max_bytes
        )


def test_a_value_is_made_once():
    cache, made = LRU(100, len), []

    def make():
        made.append("x")
        return "value"

    assert cache.get("key", make) is cache.get("key", make)
    assert made == ["x"]


def test_a_maker_that_fails_leaves_nothing_behind():
    cache = LRU(100, len)

    def fail():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        cache.get("key", fail)
    assert cache.get("key", lambda: "value") == "value"


def test_clear_forgets_values_and_goes_on_counting():
    cache = LRU(100, len)
    cache.get("key", lambda: "value")
    cache.clear()
    assert cache.stats == CacheStats(hits=0, misses=1, entries=0, size_bytes=0, max_bytes=100)
    cache.get("key", lambda: "value")
    assert cache.stats.misses == 2


def test_tensor_bytes_counts_elements_not_storage():
    assert tensor_bytes(torch.zeros(3, 4), torch.zeros(5, dtype=torch.bfloat16)) == 58
    assert tensor_bytes(torch.zeros(1).expand(10)) == 40


def test_digest_depends_on_every_bit_and_not_on_strides():
    x = torch.arange(12.0).view(3, 4)
    assert digest(x) == digest(x.clone()) == digest(x.t().contiguous().t())
    assert digest(x) != digest(x + 1e-6)
    assert digest(torch.zeros(1)) != digest(-torch.zeros(1))
    assert digest(torch.zeros(3, dtype=torch.bfloat16)) != digest(torch.zeros(3))
