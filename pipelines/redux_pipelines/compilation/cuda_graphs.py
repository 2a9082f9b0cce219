"""Steps of the transformer replayed as CUDA graphs, one per shape, the least used forgotten.

A graph holds the addresses and the numbers it was captured with. So a step's tensors are copied
into buffers of their own before each replay, and whatever else differs between requests, the groups
of keys with their biases, is part of the key. Where a capture fails, the step runs as it did.
Never run on a GPU yet: the tests on a CPU replay with a stand-in. Knows no requests.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from redux_pipelines.network.flux import BlockContext
from redux_pipelines.network.layers import Rope

logger = logging.getLogger(__name__)

Step = Callable[[Tensor, Tensor, Tensor, BlockContext], Tensor]
"""``Flux.forward``: velocity of ``img``, from ``txt``, a step's modulations and the context."""


class Replay(Protocol):
    """A captured computation."""

    @property
    def output(self) -> Tensor:
        """What the computation returned."""
        ...

    def replay(self) -> None:
        """Compute ``output`` anew from what the captured tensors hold now."""
        ...

    def reset(self) -> None:
        """Free its memory. Nothing is replayed afterwards."""
        ...


Capture = Callable[[Callable[[], Tensor]], Replay]
"""Captures a computation without arguments. Raises ``RuntimeError`` where that is impossible."""


class _Inputs(NamedTuple):
    """All tensors that a step reads and a request brings."""

    img: Tensor
    mod: Tensor
    txt: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class _Entry:
    inputs: _Inputs
    captured: Replay


class GraphedStep:
    """``step`` with at most ``max_graphs`` of its shapes captured.

    Results are the same bits that ``step`` gives. A shape whose capture failed is not tried again
    until it was forgotten.
    """

    def __init__(self, step: Step, capture: Capture, max_graphs: int) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs={max_graphs} must be at least 1")
        self._step = step
        self._capture = capture
        self._max_graphs = max_graphs
        self._entries: OrderedDict[Hashable, _Entry | None] = OrderedDict()

    @property
    def captured(self) -> int:
        """Graphs held now."""
        return sum(entry is not None for entry in self._entries.values())

    def __call__(self, img: Tensor, txt: Tensor, mod: Tensor, context: BlockContext) -> Tensor:
        """Replay the graph of this shape, or run the step; the result is a tensor of its own."""
        inputs = _Inputs(img, mod, txt, *context.rope)
        entry = self._find(_key(inputs, context), inputs, context)
        if entry is None:
            return self._step(img, txt, mod, context)
        for buffer, given in zip(entry.inputs, inputs, strict=True):
            buffer.copy_(given)
        entry.captured.replay()
        return entry.captured.output.clone()  # the next replay writes over it

    def clear(self) -> None:
        """Forget every graph and free its memory."""
        while self._entries:
            self._forget()

    def _find(self, key: Hashable, inputs: _Inputs, context: BlockContext) -> _Entry | None:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        while len(self._entries) >= self._max_graphs:
            self._forget()
        entry = self._entries[key] = self._try_capture(inputs, context)
        return entry

    def _try_capture(self, inputs: _Inputs, context: BlockContext) -> _Entry | None:
        buffers = _Inputs(*(each.clone() for each in inputs))
        own = replace(context, txt=buffers.txt, rope=Rope(buffers.cos, buffers.sin))
        try:
            captured = self._capture(lambda: self._step(buffers.img, buffers.txt, buffers.mod, own))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            logger.warning("no CUDA graph for %d rows: %s", context.rope.cos.shape[0], error)
            return None
        return _Entry(buffers, captured)

    def _forget(self) -> None:
        _, entry = self._entries.popitem(last=False)
        if entry is not None:
            entry.captured.reset()


def _key(inputs: _Inputs, context: BlockContext) -> Hashable:
    """All that a graph cannot be given later."""
    kinds = tuple((tuple(each.shape), each.dtype, each.device) for each in inputs)
    return kinds, context.groups


class CudaCapture:
    """A ``Capture`` by the GPU's driver; its graphs share their memory for what is in between.

    That is sound because results are copied out before another graph is replayed.
    """

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> "_CudaReplay":
        """Run once for what libraries set up when first called, then capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()
        return _CudaReplay(graph, output)


@dataclass(frozen=True, slots=True)
class _CudaReplay:
    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> None:
        self.graph.replay()

    def reset(self) -> None:
        self.graph.reset()
