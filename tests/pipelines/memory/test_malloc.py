"""Freed host memory: kept by glibc's malloc, and other mallocs left alone."""

import ctypes
import subprocess
import sys

import pytest

from redux_pipelines.memory import malloc

HAS_GLIBC = getattr(ctypes.CDLL(None), "mallopt", None) is not None
TAKE_AGAIN = """
import ctypes, resource, sys
from redux_pipelines.memory.malloc import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 64 << 20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        piece = libc.malloc(SIZE)
        ctypes.memset(piece, 1, SIZE)
        libc.free(piece)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

untouched = faults()
assert keep_freed_memory()
faults()
print(untouched, faults())
"""


@pytest.mark.skipif(not HAS_GLIBC, reason="malloc is not glibc's")
def test_freed_memory_is_taken_again_without_the_system():
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{TAKE_AGAIN}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    untouched, kept = map(int, done.stdout.split())
    assert untouched > 100 > kept  # huge pages are 2 MiB: 32 faults a piece, at least


def test_other_mallocs_are_left_alone(monkeypatch):
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: object())
    assert not malloc.keep_freed_memory()
