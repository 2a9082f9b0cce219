"""Whether freed memory stays in the process, by the page faults of taking it again."""

import ctypes
import subprocess
import sys

import pytest

from redux_pipelines import devices

HAS_GLIBC = getattr(ctypes.CDLL(None), "mallopt", None) is not None
TAKE_AGAIN = """
import ctypes, resource, sys
from redux_pipelines.host_memory import keep_freed_memory

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
    command = [sys.executable, "-c", TAKE_AGAIN]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    untouched, kept = map(int, done.stdout.split())
    assert untouched > 100 > kept  # huge pages are 2 MiB: 32 faults a piece, at least


def test_other_mallocs_are_left_alone(monkeypatch):
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda _: object())
    assert not devices.keep_freed_memory()
