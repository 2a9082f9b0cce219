"""Where rows in e4m3 lie between the kernel that quantises them and the product that takes them.

Each product of a step takes its rows right after they were made, so all of them can lie in the same
memory: what a step would else allocate for each, hundreds of times. Knows no kernels and no blocks.
"""

import torch
from torch import Tensor

from redux_kernels.checks import Quantized
from redux_pipelines.fp8.linear import E4M3


class Workspace:
    """One piece of memory, which each use writes over; it grows to the largest that is asked for.

    For one run over a network's blocks, on one stream. It must not outlive what it was made in: a
    CUDA graph holds addresses of memory that is its own.
    """

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._scales: Tensor | None = None
        self._parts: dict[tuple[torch.Size, int], Quantized] = {}

    def room(self, x: Tensor, width: int) -> Quantized:
        """For ``width`` columns of each row of ``x (B, n, H)``: as ``checks.empty_quantized``.

        What was there before is lost with the next use.
        """
        key = x.shape, width
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = self._part(x, width)
        return found

    def _part(self, x: Tensor, width: int) -> Quantized:
        count = x.shape[0] * x.shape[1]
        self._rows = self._at_least(self._rows, count * width, x, E4M3)
        self._scales = self._at_least(self._scales, count, x, torch.float32)
        return (
            self._rows[: count * width].view(count, width),
            self._scales[:count].view(count, 1),
        )

    def _at_least(self, held: Tensor | None, count: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        if held is not None and len(held) >= count:
            return held
        self._parts.clear()  # views of what is too small: nothing is to hold it any more
        return x.new_empty(count, dtype=dtype)
