"""Steps of the transformer replayed as CUDA graphs, one per shape, the least used forgotten.

A graph holds the addresses and the numbers it was captured with. So a step's tensors are copied
into buffers of their own before each replay, and whatever else differs between requests, the groups
of keys with their biases, is part of the key. No graph is believed before it has given the step's
bits for other numbers than it was captured with. Where a capture fails, the step runs as it did.
Not run on a GPU yet: the tests on a CPU replay with a stand-in. Knows no requests.
"""

import gc
import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from redux_pipelines.network.flux import BlockContext
from redux_pipelines.network.layers import Rope

logger = logging.getLogger(__name__)

_REMEMBERED = 64  # shapes without a graph

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
"""Captures a computation without arguments. What it raises means that this is impossible."""


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
    """``step`` with at most ``max_graphs`` of its shapes captured, none of more than ``max_rows``.

    Rows are those of text and image, of all images of a batch together. Results are the same bits
    that ``step`` gives. The first step of a shape runs as it is, and is what its graph is held
    against: that costs two more steps and two replays, once. A shape that cannot be captured is not
    tried again until it was forgotten. One wrong graph is the end of all: ``failure`` says why.

    With ``waits`` a shape is captured when a second request has it: strengths, weights and masks of
    a request are part of its shape, and to capture one that never comes again is a loss.
    """

    def __init__(
        self, step: Step, capture: Capture, max_graphs: int, *, max_rows: float = math.inf
    ) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs={max_graphs} must be at least 1")
        self.failure: str | None = None
        self.waits = False
        self._step = step
        self._capture = capture
        self.max_graphs = max_graphs
        self._max_rows = max_rows
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._plain: OrderedDict[Hashable, Callable[[], Tensor | None] | None] = OrderedDict()

    @property
    def captured(self) -> int:
        """Graphs held now."""
        return len(self._entries)

    def takes(self, img: Tensor, txt: Tensor) -> bool:
        """Whether a step of ``img (B, L, C)`` and ``txt (…, T, H)`` is one that is captured."""
        rows = len(img) * (img.shape[1] + txt.shape[-2])
        return self.failure is None and rows <= self._max_rows

    def __call__(self, img: Tensor, txt: Tensor, mod: Tensor, context: BlockContext) -> Tensor:
        """Replay the graph of this shape, or run the step; the result is a tensor of its own."""
        if not self.takes(img, txt):
            return self._step(img, txt, mod, context)
        inputs = _Inputs(img, mod, txt, *context.rope)
        key = _key(inputs, context)
        if key in self._entries:
            self._entries.move_to_end(key)
            return _replayed(self._entries[key], inputs).clone()  # the next replay writes over it
        if not self._is_due(key, txt):
            return self._step(img, txt, mod, context)
        return self._first(key, inputs, context)

    def clear(self) -> None:
        """Forget every graph and free its memory."""
        while self._entries:
            self._forget()

    def _is_due(self, key: Hashable, txt: Tensor) -> bool:
        """Whether to capture a shape now. A request is known by its text, which all its steps have.

        Remembers of as many shapes as are of use that they were there, or cannot be captured.
        """
        if key in self._plain:
            self._plain.move_to_end(key)
            asked_by = self._plain[key]
            return asked_by is not None and asked_by() is not txt
        if self.waits:
            self._leave(key, weakref.ref(txt))
        return not self.waits

    def _leave(self, key: Hashable, asked_by: Callable[[], Tensor | None] | None) -> None:
        self._plain[key] = asked_by
        if len(self._plain) > _REMEMBERED:
            self._plain.popitem(last=False)

    def _first(self, key: Hashable, inputs: _Inputs, context: BlockContext) -> Tensor:
        """The step as it is; its graph is kept if there can be one, and if that is right."""
        out = self._run(inputs, context)
        if not bool(out.isfinite().all()):
            return out  # nothing is equal to that: the next request's step is
        while len(self._entries) >= self.max_graphs:
            self._forget()
        entry = self._try_capture(inputs, context)
        if entry is None:
            self._leave(key, None)
            return out
        self._plain.pop(key, None)
        self._entries[key] = entry
        self._prove(key, entry, inputs, out, context)
        return out

    def _prove(
        self, key: Hashable, entry: _Entry, inputs: _Inputs, out: Tensor, context: BlockContext
    ) -> None:
        try:
            is_right = self._is_right(entry, inputs, out, context)
        except Exception as error:  # the step itself has its result
            logger.warning("a CUDA graph cannot be tried: %s: %s", type(error).__name__, error)
            del self._entries[key]
            self._leave(key, None)
            entry.captured.reset()
            return
        if not is_right:
            self.failure = "a replayed step gives other numbers"
            logger.warning("no CUDA graphs any more: %s", self.failure)
            self.clear()

    def _run(self, inputs: _Inputs, context: BlockContext) -> Tensor:
        own = replace(context, txt=inputs.txt, rope=Rope(inputs.cos, inputs.sin))
        return self._step(inputs.img, inputs.txt, inputs.mod, own)

    def _try_capture(self, inputs: _Inputs, context: BlockContext) -> _Entry | None:
        buffers = _Inputs(*(each.clone() for each in inputs))
        _fill(buffers, _others(inputs))
        try:
            return _Entry(buffers, self._capture(lambda: self._run(buffers, context)))
        except Exception as error:  # whatever it is, the step runs without
            rows = context.rope.cos.shape[0]
            logger.warning("no CUDA graph for %d rows: %s: %s", rows, type(error).__name__, error)
            return None

    def _is_right(self, entry: _Entry, inputs: _Inputs, out: Tensor, context: BlockContext) -> bool:
        """Whether replays give ``out`` for ``inputs``, and then what belongs to other inputs.

        The graph was captured with the latter: one that computes nothing, or not from all that it
        is given, or the same at every replay, differs in one of the two.
        """
        others = _others(inputs)
        rounds = ((inputs, out), (others, self._run(others, context)))
        return all(torch.equal(_replayed(entry, each), want) for each, want in rounds)

    def _forget(self) -> None:
        _, entry = self._entries.popitem(last=False)
        entry.captured.reset()


def _fill(buffers: _Inputs, inputs: _Inputs) -> None:
    for buffer, given in zip(buffers, inputs, strict=True):
        buffer.copy_(given)


def _replayed(entry: _Entry, inputs: _Inputs) -> Tensor:
    """The graph's own output. It is NaN before: what a graph does not write is seen."""
    _fill(entry.inputs, inputs)
    entry.captured.output.fill_(math.nan)
    entry.captured.replay()
    return entry.captured.output


def _others(inputs: _Inputs) -> _Inputs:
    """Inputs that differ from ``inputs`` in every tensor, and are no larger: nothing overflows."""
    return _Inputs(*(each.roll(1, -1).mul_(0.5).add_(0.125) for each in inputs))


def _key(inputs: _Inputs, context: BlockContext) -> Hashable:
    """All that a graph cannot be given later."""
    kinds = tuple((tuple(each.shape), each.dtype, each.device) for each in inputs)
    return kinds, context.groups


class CudaCapture:
    """A ``Capture`` by the GPU's driver; its graphs share their memory for what is in between.

    That is sound because results are copied out before another graph is replayed. A capture that
    fails leaves the current stream, the allocator and the graphs made before as they were. Written
    from torch 2.13's ``CUDAGraph.cpp`` and ``CUDACachingAllocator.cpp``, not run on a GPU yet.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._live = 0
        self._broken: list[torch.cuda.CUDAGraph] = []

    def __call__(self, run: Callable[[], Tensor]) -> "_CudaReplay":
        """Run once for what libraries set up when first called, then capture."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)
        if not self._live:  # a pool whose last graph is gone takes no other
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # the graph's memory is not the allocator's
        with _no_garbage_collection(), torch.cuda.stream(self._stream):
            return self._capture(run)

    def _capture(self, run: Callable[[], Tensor]) -> "_CudaReplay":
        """With our stream as the current one. Other threads may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            output = run()
            graph.capture_end()
        except BaseException:
            self._abandon(graph)
            raise
        self._live += 1
        return _CudaReplay(graph, output, self._released)

    def _released(self) -> None:
        self._live -= 1

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed anywhere, and what the allocator does for it.

        ``capture_end`` of an invalid capture raises before it tells the allocator, which would then
        refuse the next capture into this pool, defer frees, and go on to ask ``graph`` which
        streams are captured: so it is told here, and ``graph`` is kept.
        """
        with suppress(RuntimeError):
            graph.capture_end()
        if _has_ended(graph):
            with suppress(RuntimeError):
                graph.reset()
        else:
            self._broken.append(graph)
            for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with suppress(RuntimeError):
                    end(self._stream.device_index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        with suppress(RuntimeError):
            self._stream.synchronize()


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether ``capture_end`` came to where the graph owns its memory."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection could free, in the middle of a capture, what must not be freed in one."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class _CudaReplay:
    graph: torch.cuda.CUDAGraph
    output: Tensor
    released: Callable[[], None]

    def replay(self) -> None:
        self.graph.replay()

    def reset(self) -> None:
        self.graph.reset()
        self.released()
