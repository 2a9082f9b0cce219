"""The device that a pipeline runs on: which one, in which dtype, its failures and its time.

torch has one type for most failures of a device, so their text decides what they mean; it is that
of CUDA and its libraries. A GPU computes what the host has queued, a CPU at once. Knows no model
and makes no tensors.
"""

import os
import re
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

from redux_pipelines.errors import DeviceError, DeviceMemoryError
from redux_pipelines.jobs import Job

Event = TypeVar("Event")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BFLOAT16_SINCE = (8, 0)  # compute capability
_NO_MEMORY = ("out of memory", "can't allocate memory", "_ALLOC_FAILED", "_ALLOC_ERROR")
_FINAL = (
    "CUDA error",
    "CUDA driver error",
    "Triton Error [CUDA]",
    "CUBLAS_STATUS_",
    "CUDNN_STATUS_",
)


def resolve_device(device: str) -> torch.device:
    """The device meant by ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; a GPU always has its number.

    ``cuda``, and ``auto`` where there is a GPU, is the calling thread's current one. Raises
    ``ValueError`` for another word and for a GPU that torch does not see.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:[0-9]+)?", device):
        raise ValueError(f"device={device!r} is not one of 'auto', 'cpu', 'cuda', 'cuda:N'")
    if not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch sees no CUDA device: use device='cpu'")
    count, (_, _, number) = torch.cuda.device_count(), device.partition(":")
    index = int(number) if number else torch.cuda.current_device()
    if index >= count:
        raise ValueError(
            f"device={device!r}, but torch sees {count} CUDA device(s), numbered from 0: choose "
            "one of them"
        )
    return torch.device("cuda", index)


def as_current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the calling thread's current one; afterwards it is again the one before.

    All of our work on a device is done within. Tensors know their device, but much else does not:
    a graph capture, a library that launches its own kernels, or page-locked memory goes to the
    current GPU. Held across a ``yield`` it would leak to the caller: see ``each_as_current``.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def each_as_current(
    device: torch.device, events: Generator[Event, None, None]
) -> Generator[Event, None, None]:
    """``events``, each made, and closed, ``as_current``; between two the caller's device is."""
    try:
        while True:
            with as_current(device):
                try:
                    event = next(events)
                except StopIteration:
                    return
            yield event
    finally:
        with as_current(device):
            events.close()


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype meant by its name; ``auto`` is bfloat16 on cuda, float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        names = ", ".join(repr(name) for name in ("auto", *_DTYPES))
        raise ValueError(f"dtype={dtype!r} is not one of {names}")
    return _DTYPES[dtype]


def slow_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``dtype`` is slow on ``device`` and what to use instead, or None."""
    if dtype != torch.bfloat16 or has_fast_bfloat16(device):
        return None
    if device.type == "cpu":
        return (
            "this CPU has no instructions for bfloat16 (AVX-512, AMX or Arm's), so that it is far "
            "slower than float32: use --dtype float32"
        )
    return f"{device} has no bfloat16 units, so it is slow; try --dtype float16"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 have kernels of their own there.

    On other CPUs torch multiplies them one by one, a hundred times slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _BFLOAT16_SINCE
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once could succeed. A CUDA library's lack of memory is one too."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _NO_MEMORY)


def is_final(error: BaseException) -> bool:
    """Whether the process can not be trusted to use its device again.

    Some errors of these kinds would let it go on. Taking one of them for final costs a restart,
    taking a final one for harmless costs every task that follows.
    """
    if isinstance(error, torch.AcceleratorError):
        return not is_out_of_memory(error)
    is_known = isinstance(error, RuntimeError) and any(each in str(error) for each in _FINAL)
    return is_known and not is_out_of_memory(error)


@contextmanager
def translated(advice: str) -> Iterator[None]:
    """Raise ``DeviceMemoryError`` for a lack of memory, ``DeviceError`` for a final failure.

    ``advice`` is what the former says. What the failed work held is freed, on the device too.
    """
    try:
        yield
    except RuntimeError as error:
        if is_final(error):
            raise DeviceError(f"the device failed: {_first_line(error)}") from error
        if not is_out_of_memory(error):
            raise
        reason = forget(error)
    else:
        return
    raise DeviceMemoryError(f"{advice} ({reason})")


def forget(error: BaseException) -> str:
    """Free what the frames of a lack of memory hold, and what torch keeps for later; its text."""
    reason = _first_line(error)
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    return reason


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def fence_on(device: torch.device) -> torch.cuda.Event | None:
    """An event that is done once all queued so far is; None on a CPU, where nothing is queued.

    Who waits for it sleeps: by default CUDA spins, which takes a core from those who decode and
    encode pictures meanwhile.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class Clock:
    """Seconds per stage, given to jobs; waits for the device before reading the time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self, stage: str, jobs: Iterable[Job]) -> None:
        """Give each of ``jobs`` the time since the last lap."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        for job in jobs:
            job.spend(stage, now - self._last)
        self._last = now


_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_TRIED_BYTES = 32 * 2**20  # more than the allocator takes for small pieces


def grow_segments(device: str) -> bool:
    """Let the GPU's allocator grow its segments, where it can; whether it does.

    Segments of fixed sizes leave gaps between them that no larger piece fits into. What the
    environment says of the allocator stays. A driver that maps no virtual memory, as that of some
    virtual GPUs, shows it only when memory is taken: then segments are fixed again. For programs of
    our own to call, before anything is on the device: it concerns the whole process, so a library
    may not do it to its host. Raises ``ValueError`` as ``resolve_device``. Not run on a GPU yet.
    """
    found = resolve_device(device)
    is_free = not any(os.environ.get(name) for name in _ALLOCATOR_VARIABLES)
    if found.type != "cuda" or not is_free or torch.cuda.get_allocator_backend() != "native":
        return False
    configure = torch._C._accelerator_setAllocatorSettings
    configure("expandable_segments:True")
    try:
        torch.empty(_TRIED_BYTES, dtype=torch.uint8, device=found)
    except RuntimeError:
        configure("expandable_segments:False")
        return False
    return True
