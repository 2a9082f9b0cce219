"""How this process takes memory from the system and gives it back. Knows no tensors.

For programs of our own: it concerns the whole process, so no library may do it to its host.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Let malloc keep up to ``KEPT_BYTES`` of what is freed, and serve pieces of that size from it.

    By default glibc returns large pieces to the system at once, and a step of a model on a CPU,
    which takes the same tens of MiB again and again, gets them back page by page. False where
    malloc is not glibc's: then nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD)
    return all([mallopt(option, KEPT_BYTES) for option in options])
