"""What a device's failures mean: which of them are a lack of memory, and which are final.

torch has one type for most of them, so the text decides; it is that of CUDA and its libraries.
"""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from redux_pipelines.errors import DeviceError, DeviceMemoryError

logger = logging.getLogger(__name__)

_NO_MEMORY = ("out of memory", "can't allocate memory", "_ALLOC_FAILED", "_ALLOC_ERROR")
_FINAL = (
    "CUDA error",
    "CUDA driver error",
    "Triton Error [CUDA]",
    "CUBLAS_STATUS_",
    "CUDNN_STATUS_",
)


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
