"""Weights that live in host memory and come to the device when they are needed.

``BlockStream`` brings blocks through two buffers, one ahead of the computation, on a CUDA stream of
its own; ``OnDemand`` brings a whole module for the time of a ``with``. A parameter is the same
object all the time and its address on the device never changes while it is there. On a CPU the same
code copies within host memory, so that it can be tested there. Weights must not be changed, made or
moved by others meanwhile. Knows no network and does not decide what goes where (``memory.plan``
does).
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT = 256
"""Bytes; as the addresses that CUDA's allocator gives."""

_LANES = 2


class Packed:
    """The weights of a module, or some of them, in one piece of host memory.

    Page-locked where ``device`` is a GPU. Once packed, the weights are views of that piece.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._tensors = tuple(tensors)
        sizes = [_aligned(each.numel() * each.element_size()) for each in tensors]
        self._starts = [0, *accumulate(sizes)]
        size, pinned = self._starts[-1], device.type == "cuda"
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for tensor, view in zip(self._tensors, self._views(self.host), strict=True):
            view.copy_(tensor.detach())
        self.bind(self.host)

    @property
    def size_bytes(self) -> int:
        """Of the piece, gaps between tensors included."""
        return self._starts[-1]

    def bind(self, memory: Tensor) -> None:
        """Let the weights be views of ``memory``, bytes laid out as ``host``."""
        for tensor, view in zip(self._tensors, self._views(memory), strict=True):
            tensor.data = view

    def _views(self, memory: Tensor) -> Iterator[Tensor]:
        for start, tensor in zip(self._starts, self._tensors, strict=False):
            end = start + tensor.numel() * tensor.element_size()
            yield memory[start:end].view(tensor.dtype).view(tensor.shape)


class BlockStream:
    """Some of ``blocks`` in host memory; ``ready`` brings them to ``device``, and the next ahead.

    ``streamed`` are the indices of those. Blocks may be used in any order and any may be left out;
    prefetching expects ascending order, over and over. A streamed block always uses the same one
    of the two buffers. Two blocks that stream are never copied again.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], streamed: Collection[int], device: torch.device
    ) -> None:
        self._order = sorted(streamed)
        self._positions = {index: position for position, index in enumerate(self._order)}
        self._packed = [Packed(tensors_of(blocks[index]), device) for index in self._order]
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
            each.bind(each.host)

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
        lane.fetch(position, self._packed[position].host)
        return lane


class _Lane:
    """A buffer on the device, what it holds, and the stream on which that arrives."""

    def __init__(self, size_bytes: int, device: torch.device, stream: Any) -> None:
        self.memory = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self._device = device
        self._stream = stream
        self._holds: int | None = None
        self._arrived: Any = None

    def fetch(self, position: int, host: Tensor) -> None:
        """Start to copy ``host`` here, after all that the device was given to do so far."""
        if self._holds == position:
            return
        self._holds = position
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with _on(self._stream):
            self.memory[: host.numel()].copy_(host, non_blocking=True)
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
        self._stream = BlockStream(layers, range(len(layers)), device)
        inside = {id(each) for layer in layers for each in tensors_of(layer)}
        self._rest = Packed([e for e in tensors_of(module) if id(e) not in inside], device)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._readies(index))

    def __enter__(self) -> None:
        """Bring what is not a layer."""
        self._rest.bind(self._rest.host.to(self._device, non_blocking=True))
        self._stream.open()

    def __exit__(self, *_: object) -> None:
        """Give the device's memory back."""
        self._stream.close()
        self._rest.bind(self._rest.host)

    def _readies(self, index: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any) -> None:
            self._stream.ready(index)

        return hook


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def _on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
