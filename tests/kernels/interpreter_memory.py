"""Watches what a kernel touches in Triton's interpreter, where a wrong address is silent.

Each launch fails that reads or writes outside its tensors' storages, that writes an element twice,
or that reads what it writes: programs run in any order on a GPU, one after the other here. Gaps
inside a storage are for canaries (``kernel_cases``). Within ``in_place`` a program may write to
what it alone reads, which is no race where each thread writes to what it has read itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

_NONE = np.empty(0, np.uint64)


class _Launch:
    """The storages of one launch's tensors, and the bytes touched so far."""

    def __init__(self, tensors: list[Tensor]) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors]
        self.ranges = [(each.data_ptr(), each.data_ptr() + each.nbytes()) for each in storages]
        self.read: list[np.ndarray] = [_NONE]
        self.written: list[np.ndarray] = [_NONE]
        self.reads_before = self.writes_before = 1  # entries of programs that have ended

    def touch(self, pointers: Any, mask: Any, touched: list[np.ndarray], what: str) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        mask = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        first = pointers.data[mask].astype(np.uint64).ravel()
        inside = np.zeros(first.shape, dtype=bool)
        for start, end in self.ranges:
            inside |= (first >= start) & (first + size <= end)
        if not inside.all():
            raise IndexError(f"kernel {what} outside its tensors at {(~inside).sum()} addresses")
        touched.append(first)

    def end_program(self) -> None:
        """Within ``in_place``: forget the reads of what the program that has ended has written."""
        if _is_in_place:
            own = np.concatenate([_NONE, *self.read[self.reads_before :]])
            changed = np.concatenate([_NONE, *self.written[self.writes_before :]])
            kept = own[~np.isin(own, changed)]
            self.read[self.reads_before :] = [kept]
        self.reads_before, self.writes_before = len(self.read), len(self.written)

    def finish(self) -> None:
        self.end_program()
        read, written = np.concatenate(self.read), np.concatenate(self.written)
        if len(np.unique(written)) != len(written):
            raise IndexError("kernel writes an element twice: programs race")
        if np.intersect1d(read, written).size:
            raise IndexError("kernel reads what it writes: programs race")


_is_in_place = False


@contextmanager
def in_place() -> Iterator[None]:
    """Within, a program may write to what it alone reads."""
    global _is_in_place
    _is_in_place = True
    try:
        yield
    finally:
        _is_in_place = False


def install() -> None:
    """Watch every launch of this process."""
    current: list[_Launch] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    stock_call = executor.__call__
    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store
    stock_next = builder.set_grid_idx

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        leaves = tree_leaves((args, kwargs))  # a kernel may take tuples of tensors
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        current.append(_Launch(tensors))
        try:
            stock_call(self, *args, **kwargs)
            current[-1].finish()
        finally:
            current.pop()

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        current[-1].touch(pointers, mask, current[-1].read, "reads")
        return stock_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current[-1].touch(pointers, mask, current[-1].written, "writes")
        return stock_store(self, pointers, value, mask, *rest)

    def next_program(self: Any, *place: int) -> None:
        if current:
            current[-1].end_program()
        stock_next(self, *place)

    executor.__call__ = call
    builder.set_grid_idx = next_program
    builder.create_masked_load, builder.create_masked_store = load, store
