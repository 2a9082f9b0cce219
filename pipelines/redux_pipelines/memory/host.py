"""Host memory for weights: few large slabs, whose sizes are powers of two.

torch rounds every page-locked piece up to a power of two (``CachingHostAllocator::allocate`` of
2.11 and of 2.13), which makes 21 GB of 16 GB of weights. So slabs are such sizes from the start,
and weights lie in them side by side. Slabs come one by one, as they are needed: what is copied into
them is freed meanwhile. Knows no modules and no plan.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes; as the addresses that CUDA's allocator gives."""

SLAB_BYTES = 2**31
"""At most. In larger ones less is left over at their ends, but more is there before it is used."""

_ENOUGH = 1 / 16
"""Of what is still to come a last slab may have that much to spare; else it is halved."""


class Layout:
    """Where pieces lie in slabs: each in the first that has room for it.

    ``expected_bytes`` of pieces are to come in all, their gaps included; from that the last slabs'
    sizes follow. More than that is possible.
    """

    def __init__(self, expected_bytes: int) -> None:
        self.slabs: list[int] = []
        self._free: list[int] = []
        self._expected_bytes = expected_bytes

    def place(self, size_bytes: int) -> tuple[int, int]:
        """A piece's slab and where it starts there; a new slab if there is no room."""
        size_bytes = aligned(size_bytes)
        fitting = (i for i, free in enumerate(self._free) if free >= size_bytes)
        index = next(fitting, len(self.slabs))
        if index == len(self.slabs):
            self.slabs.append(self._new_slab_bytes(size_bytes))
            self._free.append(self.slabs[index])
        start = self.slabs[index] - self._free[index]
        self._free[index] -= size_bytes
        self._expected_bytes -= size_bytes
        return index, start

    def _new_slab_bytes(self, at_least: int) -> int:
        to_come = max(self._expected_bytes, at_least)
        slab_bytes = _power_of_two(to_come)
        if slab_bytes - to_come > _ENOUGH * to_come:
            slab_bytes //= 2
        return max(min(slab_bytes, SLAB_BYTES), _power_of_two(at_least))


class Piece(NamedTuple):
    """Bytes ``start`` to ``end`` of a slab."""

    slab: Tensor
    start: int
    end: int

    def tensor(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """These bytes as a tensor, which may take fewer of them."""
        end = self.start + dtype.itemsize * shape.numel()
        return self.slab[self.start : end].view(dtype).view(shape)

    def tensor_like(self, given: Tensor) -> Tensor:
        """These bytes as a tensor of the dtype and shape of ``given``, laid out as that is.

        Its strides are those that ``torch.empty_like`` would give it: gaps are left out.
        """
        strides = torch.empty_like(given, device="meta").stride()
        return self.tensor(given.dtype, given.shape).as_strided(given.shape, strides)


class HostMemory:
    """Slabs that pieces are taken from; page-locked, if ``pinned``, so that a GPU reads them fast.

    ``expected_bytes`` as in ``Layout``. A slab is freed with the last tensor in it.
    """

    def __init__(self, expected_bytes: int, *, pinned: bool) -> None:
        self._layout = Layout(expected_bytes)
        self._slabs: list[Tensor] = []
        self._pinned = pinned

    def take(self, size_bytes: int) -> Piece:
        """Room for ``size_bytes``, filled up to ``ALIGNMENT``."""
        index, start = self._layout.place(size_bytes)
        if index == len(self._slabs):
            self._slabs.append(_allocate(self._layout.slabs[index], pinned=self._pinned))
        return Piece(self._slabs[index], start, start + aligned(size_bytes))


def _allocate(size_bytes: int, *, pinned: bool) -> Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)


def size_of(tensor: Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.element_size()


def aligned(size_bytes: int) -> int:
    """What a piece of ``size_bytes`` takes."""
    return max(1, -(-size_bytes // ALIGNMENT)) * ALIGNMENT


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()
