"""What code that took over the decoding process could still do: an exploit's list, tried for real.

The calls go to the kernel directly, as code in a broken codec would make them.
"""

import ctypes
import ctypes.util
import errno
import json
import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import structlog

from redux_server.pictures import confinement, decode, decode_child
from redux_server.pictures.decode import accepted_formats, confinement_gap
from server.hostile_images import encoded, gradient

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="there is no list of system calls for this machine",
)

# Within the very confinement of a decoder: the numbers of the calls are looked up before it.
EXPLOIT = """
import ctypes, errno, json, mmap, os, signal, socket, sys, threading
sys.path[:0] = json.loads(sys.argv[1])
victim, port, numbers = sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
from redux_server.pictures import decode_child
order = decode_child.Order("PNG", 10**6, 16, 2**28, 10.0, ())
libc = ctypes.CDLL(None, use_errno=True)
parent = os.getppid()
environ = f"/proc/{parent}/environ"
tried, done = {}, {}
def call(name, *arguments):
    result = libc.syscall(ctypes.c_long(numbers[name]), *arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result
def path(text):
    return ctypes.c_char_p(text.encode())
def fork():
    if os.fork() == 0:
        os._exit(0)
def vfork():
    if call("clone", 0x4100 | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        os._exit(0)
def thread():
    threading.Thread(target=lambda: done.update(thread=True)).start()
how = ctypes.create_string_buffer(128)
tries = {
    "open for reading": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "open for writing": lambda: os.open(victim, os.O_RDWR),
    "create": lambda: os.open(victim + "-new", os.O_CREAT | os.O_WRONLY),
    "openat2": lambda: call("openat2", -100, path(victim), how, 24),
    "open the parent's environment": lambda: os.open(environ, os.O_RDONLY),
    "unlink": lambda: os.unlink(victim),
    "rename": lambda: os.rename(victim, victim + "-2"),
    "chmod": lambda: os.chmod(victim, 0o777),
    "stat": lambda: os.stat(victim),
    "list": lambda: os.listdir("/"),
    "mkdir": lambda: os.mkdir(victim + "-folder"),
    "socket": lambda: socket.socket(),
    "unix socket": lambda: socket.socket(socket.AF_UNIX),
    "connect": lambda: call("connect", 1, ctypes.create_string_buffer(16), 16),
    "duplicate": lambda: os.dup(1),
    "pipe": lambda: os.pipe(),
    "memfd": lambda: os.memfd_create("x"),
    "io_uring": lambda: call("io_uring_setup", 8, ctypes.create_string_buffer(120)),
    "pidfd": lambda: call("pidfd_open", parent, 0),
    "userfaultfd": lambda: call("userfaultfd", 0),
    "bpf": lambda: call("bpf", 0, ctypes.create_string_buffer(64), 64),
    "perf": lambda: call("perf_event_open", ctypes.create_string_buffer(128), 0, -1, -1, 0),
    "fork": fork,
    "a process by clone": vfork,
    "clone3": lambda: call("clone3", ctypes.create_string_buffer(64), 64),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill the parent": lambda: os.kill(parent, 9),
    "kill a thread of the parent": lambda: call("tgkill", parent, parent, 9),
    "signal with data": lambda: call("rt_sigqueueinfo", parent, 9, how),
    "ptrace": lambda: call("ptrace", 16, parent, 0, 0),
    "read the parent's memory": lambda: call("process_vm_readv", parent, 0, 0, 0, 0, 0),
    "write the parent's memory": lambda: call("process_vm_writev", parent, 0, 0, 0, 0, 0),
    "limits of the parent": lambda: call("prlimit64", parent, 7, 0, 0),
    "own limits": lambda: call("prlimit64", 0, 7, 0, 0),
    "leave the session": lambda: os.setsid(),
    "namespace": lambda: call("unshare", 0x10000000),
    "change user": lambda: os.setuid(os.getuid()),
    "priority of the parent": lambda: os.setpriority(os.PRIO_PROCESS, parent, 0),
    "memory that is written and run": lambda: mmap.mmap(-1, 4096, prot=7),
    "memory that is run": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "make memory runnable": lambda: call("mprotect", ctypes.c_void_p(page), 4096, 7),
    "shared memory": lambda: call("shmget", 1234, 4096, 0o1600),
    "a key ring": lambda: call("add_key", path("user"), path("x"), path("y"), 1, -1),
    "undo the filter": lambda: call("seccomp", 0, 0, 0),
}
room = mmap.mmap(-1, 4096)
page = ctypes.addressof(ctypes.c_char.from_buffer(room))
decode_child._load_code("PNG", b"")
sys.stdin.buffer.read()
closing = sys.argv[5] == "close"
assert decode_child._confine(order) == ""
for name, attempt in tries.items():
    if closing:
        for number in (0, 2):
            try: os.close(number)
            except OSError: pass
    try:
        attempt()
    except OSError as error:
        tried[name] = error.errno
    except BaseException as error:
        tried[name] = repr(error)
    else:
        tried[name] = "done"
thread()
bytearray(2**24)
mmap.mmap(-1, 2**20).close()
done.update(memory=True, clock=__import__("time").monotonic() > 0)
os.write(1, json.dumps([tried, done]).encode())
"""
# Not of x86_64 alone: those that are have the same number in both, or a wrapper of Python's.
NUMBERS = {
    "x86_64": {
        "openat2": 437, "connect": 42, "io_uring_setup": 425, "pidfd_open": 434, "clone": 56,
        "userfaultfd": 323, "bpf": 321, "perf_event_open": 298, "clone3": 435, "tgkill": 234,
        "rt_sigqueueinfo": 129, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
        "prlimit64": 302, "unshare": 272, "mprotect": 10, "shmget": 29, "add_key": 248,
        "seccomp": 317,
    },
    "aarch64": {
        "openat2": 437, "connect": 203, "io_uring_setup": 425, "pidfd_open": 434, "clone": 220,
        "userfaultfd": 282, "bpf": 280, "perf_event_open": 241, "clone3": 435, "tgkill": 131,
        "rt_sigqueueinfo": 138, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271,
        "prlimit64": 261, "unshare": 97, "mprotect": 226, "shmget": 194, "add_key": 217,
        "seccomp": 277,
    },
}  # fmt: skip


@pytest.mark.parametrize("way", ["as it is", "close"])
def test_an_exploit_within_a_decoder_gets_nowhere(way: str, tmp_path: Path) -> None:
    """Once with the descriptors that it has, and once after it closed some to have free numbers."""
    victim = tmp_path / "victim"
    victim.write_text("whole")
    found = subprocess.run(
        [
            *(sys.executable, "-I", "-S", "-B", "-c", textwrap.dedent(EXPLOIT)),
            json.dumps(decode._import_path()),
            str(victim),
            "9",
            json.dumps(NUMBERS[platform.machine()]),
            way,
        ],
        input=b"",
        capture_output=True,
        env=decode.CHILD_ENVIRONMENT,
        check=True,
        timeout=60,
    )
    tried, done = json.loads(found.stdout)
    refused = {name: error for name, error in tried.items() if error == errno.EPERM}
    assert {name: tried[name] for name in tried.keys() - refused} == {"clone3": errno.ENOSYS}
    assert len(refused) > 40
    assert done == {"thread": True, "memory": True, "clock": True}, "what codecs need"
    assert victim.read_text() == "whole" and os.listdir(tmp_path) == ["victim"]


def test_the_decoder_that_runs_is_the_one_that_is_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the kernel says of a real one, while it waits for its file to be taken."""
    seen: list[dict[str, str]] = []
    read = decode._Child.read_image

    def look(child: decode._Child, size: tuple[int, int]) -> object:
        process = Path(f"/proc/{child._process.pid}")
        lines = (process / "status").read_text().splitlines()
        seen.append(dict(line.split(":\t", 1) for line in lines if ":\t" in line))
        limits = (process / "limits").read_text().splitlines()
        seen[-1] |= {line[:26].strip(): line[26:].split()[1] for line in limits}
        seen[-1]["session"] = str(os.getsid(child._process.pid) == child._process.pid)
        seen[-1]["files"] = " ".join(sorted(os.listdir(process / "fd")))
        seen[-1]["environ"] = (process / "environ").read_text()
        return read(child, size)

    monkeypatch.setattr(decode._Child, "read_image", look)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with open("/dev/null") as kept:
        os.set_inheritable(kept.fileno(), True)
        decode.decode_image(encoded(gradient(3000, 2000), "PNG"))  # more than a pipe holds
    [status] = seen
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1"), "a filter, for good"
    limits = ("Max core file size", "Max file size", "Max open files")
    assert [status[name] for name in limits] == ["0", "0", "0"] and status["session"] == "True"
    assert status["files"] in ("0 1 2", "1 2")
    names = {entry.partition("=")[0] for entry in status["environ"].split("\0") if entry}
    assert names == set(decode.CHILD_ENVIRONMENT)


@pytest.mark.parametrize("format_name", accepted_formats())
def test_every_format_decodes_in_several_threads_and_with_late_code(format_name: str) -> None:
    """A picture that makes codecs use what they have: threads, large tables, profiles."""
    picture = gradient(1200, 900)
    options = {"icc_profile": bytes(200)} if format_name not in ("GIF", "BMP") else {}
    image = decode.decode_image(encoded(picture, format_name, **options))
    assert image.size == picture.size


def test_this_machine_has_no_gap() -> None:
    assert confinement_gap() == ""


def test_a_gap_is_told_and_logged_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    code = Path(decode_child.__file__).read_text()
    patched = "def _confine(order: Order) -> str:\n    return 'the kernel has none'\n\ndef _was("
    script.write_text(code.replace("def _confine(", patched))
    monkeypatch.setattr(decode.decode_child, "__file__", str(script))
    monkeypatch.setattr(decode, "_gaps", {})
    with structlog.testing.capture_logs() as lines:
        assert confinement_gap() == confinement_gap() == "the kernel has none"
    [line] = [line for line in lines if "without a filter" in line["event"]]
    assert (line["log_level"], line["reason"]) == ("warning", "the kernel has none")


@pytest.mark.parametrize("machine", ["riscv64", "i686"])
def test_a_machine_without_a_list_says_so(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "", "", "", machine)))
    assert machine in confinement.confine()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_numbers_are_those_of_libseccomp(machine: str) -> None:
    """An independent table, of both machines, where the library is."""
    name = ctypes.util.find_library("seccomp")
    if name is None:
        pytest.skip("no libseccomp here")
    library = ctypes.CDLL(name)
    ours = confinement._MACHINES[machine]
    for call, number in ours.numbers.items():
        found = library.seccomp_syscall_resolve_name_arch(
            ctypes.c_uint32(ours.audit_arch), call.encode()
        )
        assert found == number, call
    assert {*confinement._ALLOWED, *confinement._WITHOUT_CODE} < set(ours.numbers)
