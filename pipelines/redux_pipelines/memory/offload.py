"""Weights that live in host memory and come to the device when they are needed.

``BlockStream`` brings blocks through two buffers, one ahead of the computation, on a CUDA stream of
its own; ``OnDemand`` brings a whole module for the time of a ``with``. A parameter is the same
object all the time and its address on the device never changes while it is there. On a CPU the same
code copies within host memory, so that it can be tested there. Weights must not be changed, made or
moved by others meanwhile. Knows no network and does not decide what goes where (``memory.plan``
does).
"""

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from redux_pipelines.memory.host import HostMemory, Piece, aligned, size_of

_LANES = 2


class Packed:
    """The weights of a module, or some of them, in host memory; they are moved there at once.

    On a device they lie in one piece, the largest first; in host memory where there is room. Their
    strides stay: a product may want a transposed one.
    """

    def __init__(self, tensors: Iterable[Tensor], memory: HostMemory) -> None:
        self._tensors = tuple(sorted(tensors, key=size_of, reverse=True))
        self._starts = [0, *accumulate(aligned(size_of(each)) for each in self._tensors)]
        pieces = []
        self._homes: list[Tensor] = []
        for tensor in self._tensors:
            pieces.append(memory.take(size_of(tensor)))
            home = pieces[-1].tensor_like(tensor)
            tensor.data = home.copy_(tensor.detach())  # frees where it was
            self._homes.append(home)
        self._runs = _runs(self._starts, pieces)

    @property
    def size_bytes(self) -> int:
        """On a device, gaps between tensors included."""
        return self._starts[-1]

    def copy_to(self, memory: Tensor) -> None:
        """Start to copy the weights from host memory to ``memory``, bytes on a device."""
        for start, run in self._runs:
            memory[start : start + len(run)].copy_(run, non_blocking=True)

    def bind(self, memory: Tensor) -> None:
        """Let the weights be views of ``memory``, which they were or will be copied to."""
        for start, tensor in zip(self._starts, self._tensors, strict=False):
            piece = Piece(memory, start, start + aligned(size_of(tensor)))
            tensor.data = piece.tensor_like(tensor)

    def unbind(self) -> None:
        """Let the weights be those in host memory."""
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            tensor.data = home


def _runs(starts: Iterable[int], pieces: Iterable[Piece]) -> list[tuple[int, Tensor]]:
    """Bytes of host memory to be copied at once, and where on the device they go.

    Pieces that lie side by side in both places are one.
    """
    runs: list[tuple[int, Piece]] = []
    for start, piece in zip(starts, pieces, strict=False):
        first, last = runs[-1] if runs else (start, None)
        if last is not None and last.slab is piece.slab and last.end == piece.start:
            runs[-1] = first, last._replace(end=piece.end)
        else:
            runs.append((start, piece))
    return [(start, piece.slab[piece.start : piece.end]) for start, piece in runs]


def _room_for(tensors: Iterable[Tensor], device: torch.device) -> HostMemory:
    """Host memory for ``tensors``, to be read by ``device``."""
    expected_bytes = sum(aligned(size_of(each)) for each in tensors)
    return HostMemory(expected_bytes, pinned=device.type == "cuda")


class BlockStream:
    """Some of ``blocks`` in host memory; ``ready`` brings them to ``device``, and the next ahead.

    ``streamed`` are the indices of those. Blocks may be used in any order and any may be left out;
    prefetching expects ascending order, over and over. A streamed block always uses the same one
    of the two buffers. Two blocks that stream are never copied again. ``memory`` is where they go
    to; by default they have one of their own.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        streamed: Collection[int],
        device: torch.device,
        memory: HostMemory | None = None,
    ) -> None:
        self._order = sorted(streamed)
        self._positions = {index: position for position, index in enumerate(self._order)}
        if memory is None:
            inside = (tensors_of(blocks[index]) for index in self._order)
            memory = _room_for((each for tensors in inside for each in tensors), device)
        self._packed = [Packed(tensors_of(blocks[index]), memory) for index in self._order]
        self._device = device
        self._lanes: list[_Lane] = []

    @property
    def buffer_bytes(self) -> int:
        """What the buffers take on the device."""
        return sum(lane.memory.numel() for lane in self._lanes)

    def open(self) -> None:
        """Make the buffers and let the blocks' weights be views of them; their content is to come.

        Only blocks that ``ready`` was called for may be used from now on.
        """
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        for parity in range(min(_LANES, len(self._order))):
            packed = self._packed[parity::_LANES]
            lane = _Lane(max(each.size_bytes for each in packed), self._device, stream)
            self._lanes.append(lane)
            for each in packed:
                each.bind(lane.memory)

    def close(self) -> None:
        """Give the buffers back; the weights are in host memory again."""
        for lane in self._lanes:
            lane.finish()
        self._lanes.clear()
        for each in self._packed:
            each.unbind()

    def ready(self, index: int) -> None:
        """To be called right before block ``index`` is used; the next one starts to come.

        Does nothing while closed: the weights are in host memory, where they can be used too.
        """
        position = self._positions.get(index)
        if position is None or not self._lanes:
            return
        lane = self._fetch(position)
        following = (position + 1) % len(self._order)
        if following % _LANES != position % _LANES:
            self._fetch(following)
        lane.wait()

    def _fetch(self, position: int) -> "_Lane":
        lane = self._lanes[position % _LANES]
        lane.fetch(position, self._packed[position])
        return lane


class _Lane:
    """A buffer on the device, what it holds, and the stream on which that arrives."""

    def __init__(self, size_bytes: int, device: torch.device, stream: Any) -> None:
        self.memory = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self._device = device
        self._stream = stream
        self._holds: int | None = None
        self._arrived: Any = None

    def fetch(self, position: int, packed: Packed) -> None:
        """Start to copy ``packed`` here, after all that the device was given to do so far."""
        if self._holds == position:
            return
        self._holds = position
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with _on(self._stream):
            packed.copy_to(self.memory)
            if self._stream is not None:
                self._arrived = self._stream.record_event()

    def wait(self) -> None:
        """Let what the device is given from now on wait for the copy."""
        if self._arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)

    def finish(self) -> None:
        """Let the buffer not be used again by others before its last copy is done."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class OnDemand:
    """A module in host memory that is on ``device`` within ``with`` only. Not for nesting.

    ``layers``, modules within it that run one after the other, stream through two buffers; all else
    comes and goes as a whole.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, layers: Sequence[nn.Module] = ()
    ) -> None:
        self._device = device
        memory = _room_for(tensors_of(module), device)
        inside = {id(each) for layer in layers for each in tensors_of(layer)}
        self._rest = Packed([e for e in tensors_of(module) if id(e) not in inside], memory)
        self._stream = BlockStream(layers, range(len(layers)), device, memory)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._readies(index))

    def __enter__(self) -> None:
        """Bring what is not a layer."""
        memory = torch.empty(self._rest.size_bytes, dtype=torch.uint8, device=self._device)
        self._rest.copy_to(memory)
        self._rest.bind(memory)
        self._stream.open()

    def __exit__(self, *_: object) -> None:
        """Give the device's memory back."""
        self._stream.close()
        self._rest.unbind()

    def _readies(self, index: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any) -> None:
            self._stream.ready(index)

        return hook


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def _on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
