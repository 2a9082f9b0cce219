"""What the process that decodes a picture may still ask of the kernel: a list of system calls.

A seccomp filter: of what is not on the list nothing happens, and the caller gets EPERM. It is for
good, for all threads and whatever is run. The list has memory, threads of our own process, clocks
and reading and writing what is open already. It has nothing with a path, a socket, a descriptor to
be made, another process or code to be loaded. The program is written out here and given to the
kernel through ctypes (decision 0024). Knows nothing of pictures.

Sources: seccomp(2), linux/seccomp.h, linux/filter.h, linux/audit.h; the numbers of the calls are
those of asm/unistd_64.h and asm-generic/unistd.h.
"""

import errno
import os
import struct
import sys
from typing import NamedTuple


class _Machine(NamedTuple):
    """An instruction set: how the kernel's audit names it, and its numbers of system calls."""

    audit_arch: int
    numbers: dict[str, int]


# As they have no pointers to paths and no descriptors in them, what they do stays in the process.
_ALLOWED = (
    *("brk", "munmap", "mremap", "madvise"),
    *("read", "write", "close", "lseek", "fstat"),
    *("futex", "set_robust_list", "rseq", "sched_yield", "sched_getaffinity", "membarrier"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "getpid", "gettid"),
    *("clock_gettime", "gettimeofday", "clock_nanosleep", "nanosleep", "getrusage", "getrandom"),
    *("exit", "exit_group"),
)
_WITHOUT_CODE = ("mmap", "mprotect")  # allowed unless what they map may be executed
# What glibc and musl start a thread with, to the bit: a process would have other flags. clone3 has
# its flags where no filter can look; told that there is none, they take clone.
_THREAD_FLAGS = (0x3D0F00, 0x7D0F00)

# fmt: off
_MACHINES = {
    "x86_64": _Machine(0xC000003E, {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10,
        "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
        "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "clone": 56,
        "exit": 60, "gettimeofday": 96, "getrusage": 98, "sigaltstack": 131, "gettid": 186,
        "futex": 202, "sched_getaffinity": 204, "clock_gettime": 228, "clock_nanosleep": 230,
        "exit_group": 231, "set_robust_list": 273, "seccomp": 317, "getrandom": 318,
        "membarrier": 324, "rseq": 334, "clone3": 435,
    }),
    "aarch64": _Machine(0xC00000B7, {
        "close": 57, "lseek": 62, "read": 63, "write": 64, "fstat": 80, "exit": 93,
        "exit_group": 94, "futex": 98, "set_robust_list": 99, "nanosleep": 101,
        "clock_gettime": 113, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124,
        "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
        "getrusage": 165, "gettimeofday": 169, "getpid": 172, "gettid": 178, "brk": 214,
        "munmap": 215, "mremap": 216, "clone": 220, "mmap": 222, "mprotect": 226, "madvise": 233,
        "seccomp": 277, "getrandom": 278, "membarrier": 283, "rseq": 293, "clone3": 435,
    }),
}
# fmt: on

_PROT_EXEC = 4
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _FLAG_TSYNC = 1, 1
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
# Classic BPF: load a word of seccomp_data, jump if equal, jump if any bit is set, return.
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16


def confine() -> str:
    """Let only the list through from now on; returns why that was not possible, or ``""``.

    Whatever has to be opened, imported or started must have been before.
    """
    machine = _MACHINES.get(os.uname().machine)
    if sys.platform != "linux" or sys.maxsize < 2**32 or machine is None:
        return f"there is no list of system calls for {sys.platform} on {os.uname().machine}"
    try:
        import ctypes
    except ImportError as error:
        return f"this Python has no ctypes ({error})"
    program = _program(machine)
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_ulong(each) for each in (1, 0, 0, 0)]
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, *arguments):
        return f"the kernel refuses no_new_privs: {os.strerror(ctypes.get_errno())}"
    if libc.syscall(
        ctypes.c_long(machine.numbers["seccomp"]),
        ctypes.c_ulong(_SET_MODE_FILTER),
        ctypes.c_ulong(_FLAG_TSYNC),
        header,
    ):
        return f"the kernel takes no seccomp filter: {os.strerror(ctypes.get_errno())}"
    return ""


def _program(machine: _Machine) -> bytes:
    """The filter: instructions of 8 bytes, each with how many to skip if true and if false."""
    numbers = machine.numbers
    code = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_IF_EQUAL, 1, 0, machine.audit_arch),
        (_RETURN, 0, 0, _KILL_PROCESS),  # calls of a second instruction set have other numbers
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for name in _ALLOWED:
        code += [(_IF_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, _ALLOW)]
    for name in _WITHOUT_CODE:
        code += [
            (_IF_EQUAL, 0, 4, numbers[name]),
            (_LOAD, 0, 0, _low_word_of_argument(2)),
            (_IF_ANY_BIT, 1, 0, _PROT_EXEC),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        ]
    code += [
        (_IF_EQUAL, 0, 1, numbers["clone3"]),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_IF_EQUAL, 0, 4, numbers["clone"]),
        (_LOAD, 0, 0, _low_word_of_argument(0)),
        (_IF_EQUAL, 1, 0, _THREAD_FLAGS[0]),
        (_IF_EQUAL, 0, 1, _THREAD_FLAGS[1]),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _low_word_of_argument(index: int) -> int:
    return _ARGUMENTS_AT + 8 * index  # both machines are little-endian
