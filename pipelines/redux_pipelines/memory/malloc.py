"""What the C library does with host memory that is freed.

For programs whose model runs on a CPU. Imports no torch; knows no model.
"""

import ctypes

KEPT_BYTES = 2**30
"""Of freed host memory that malloc may keep."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Let malloc keep up to ``KEPT_BYTES`` of what is freed, and serve pieces of that size from it.

    By default glibc returns large pieces to the system at once, and a step of a model on a CPU,
    which takes the same tens of MiB again and again, gets them back page by page. False where
    malloc is not glibc's: then nothing is changed. For programs of our own to call: it concerns the
    whole process, so a library may not do it to its host.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD)
    return all([mallopt(option, KEPT_BYTES) for option in options])
