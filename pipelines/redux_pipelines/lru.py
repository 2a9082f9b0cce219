"""A cache bounded in bytes that forgets what was used longest ago; keys and sizes of tensors.

The cache knows nothing of what it holds: whoever makes one says how large a value is. Not for use
by several threads at once; its counters may be read from any.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from redux_pipelines.contract.types import CacheStats

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRU(Generic[K, V]):
    """Values by key, at most ``max_bytes`` of them as ``size_of`` measures them.

    A value larger than the whole cache is returned but not kept; ``max_bytes=0`` keeps nothing.
    Values are handed out as they are: nobody may change them.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._size_bytes = 0
        self._hits = 0
        self._misses = 0

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value kept for ``key``; otherwise that of ``make``, which is kept from then on."""
        found = self._entries.get(key)
        if found is not None:
            self._hits += 1
            self._entries.move_to_end(key)
            return found[0]
        self._misses += 1
        value = make()
        self._keep(key, value)
        return value

    def clear(self) -> None:
        """Forget every value; the counts go on."""
        self._entries.clear()
        self._size_bytes = 0

    @property
    def stats(self) -> CacheStats:
        """Counters and sizes at this moment."""
        return CacheStats(
            self._hits, self._misses, len(self._entries), self._size_bytes, self._max_bytes
        )

    def _keep(self, key: K, value: V) -> None:
        size_bytes = self._size_of(value)
        if size_bytes > self._max_bytes:
            return
        self._entries[key] = (value, size_bytes)
        self._size_bytes += size_bytes
        while self._size_bytes > self._max_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self._size_bytes -= freed


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes that the elements of ``tensors`` take."""
    return sum(each.numel() * each.element_size() for each in tensors)


def digest(tensor: Tensor) -> bytes:
    """A key for the content of ``tensor``: two contents with the same are not to be expected."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(content.numpy().data, digest_size=16).digest()
