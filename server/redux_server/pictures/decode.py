"""Turn a caller's bytes into an RGB picture, or say what is wrong with them.

The bytes are decoded in a process of their own that is small, confined and killed at a limit (see
``decode_child``); what it answers is checked as strictly as the bytes were. Knows nothing of where
the bytes came from.
"""

import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image, features

from redux_pipelines.errors import ImageError
from redux_server.pictures import decode_child
from redux_server.pictures.decode_child import HEADER_BYTES, STRIP_BYTES, Order

MAX_PIXELS = 40_000_000
MIN_SIDE = 16
LIMIT_S = 10.0
STARVED_FACTOR = 6  # so many times longer may a picture take on a machine that has no time for it
MEMORY_BYTES = 1536 * 2**20
PIPE_BYTES = 2**20
# Nothing of ours, secrets least of all. Threads would reserve address space per processor core.
CHILD_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}

_AVIF_BRANDS = (b"avif", b"avis")
_ACCEPTED_MAGIC = (
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("BMP", re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL)),
)
_REFUSED_MAGIC = (
    ("a HEIC picture", re.compile(rb"....ftyp(?:hei|hev|mif1|msf1)", re.DOTALL)),
    ("an AVIF picture", re.compile(rb"....ftypavi[fs]", re.DOTALL)),
    ("a video", re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL)),
    ("a TIFF picture", re.compile(rb"II[*+]\0|MM\0[*+]")),
    ("a JPEG XL picture", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ")),
    ("a JPEG 2000 picture", re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51")),
    ("a Photoshop file", re.compile(rb"8BPS")),
    ("an icon file", re.compile(rb"\0\0[\x01\x02]\0")),
    ("a PDF document", re.compile(rb"%PDF")),
    ("an archive", re.compile(rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf")),
    ("an SVG drawing", re.compile(rb"\s*(?:<\?xml.*?)?<(?:!--.*?-->\s*<)?svg\b", re.DOTALL | re.I)),
    ("an HTML page", re.compile(rb"\s*<(?:!doctype html|html|head|body|script)", re.I)),
    ("an XML file", re.compile(rb"\s*<\?xml")),
    ("a JSON text", re.compile(rb"\s*[{\[]")),
    ("a text", re.compile(rb"[\t\n\r\x20-\x7e]{16}")),
)


class DecodeError(ImageError):
    """Bytes that are not an acceptable picture; the text is fit for the caller.

    ``reason`` is a slug for a metric: empty, format, pixels, small, broken, memory or slow.
    """

    def __init__(self, reason: str, public_message: str) -> None:
        super().__init__(public_message)
        self.reason = reason
        self.public_message = public_message


def accepted_formats() -> tuple[str, ...]:
    """The formats ``decode_image`` takes; AVIF only where this Pillow was built with it."""
    names = tuple(name for name, _ in _ACCEPTED_MAGIC)
    return (*names, "AVIF") if features.check("avif") else names


def sniff(data: bytes) -> str | None:
    """Name the format by its first bytes, or None for any that is not accepted."""
    head = data[:64]
    for name, magic in _ACCEPTED_MAGIC:
        if magic.match(head):
            return name
    return "AVIF" if _is_avif(head) and features.check("avif") else None


def refusal_of(data: bytes) -> str:
    """What bytes that ``sniff`` does not accept seem to be, as in "an HTML page"."""
    head = data[:1024]
    return next((name for name, magic in _REFUSED_MAGIC if magic.match(head)), "no known picture")


def _is_avif(head: bytes) -> bool:
    if head[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end, 4))]
    return any(brand in _AVIF_BRANDS for brand in brands)


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, limit_s: float = LIMIT_S
) -> Image.Image:
    """Decode ``data`` to mode RGB: turned as its EXIF says, on white, without metadata.

    Of an animation the first frame. ``limit_s`` bounds the processor time, and the wall-clock time
    as well unless the machine gave the process no processor.

    Raises:
        DecodeError: the bytes are no acceptable picture.
        RuntimeError: the decoding process could not start (an installation fault).
    """
    format_name = sniff(data)
    if format_name is None:
        raise _format_error(data)
    order = Order(
        format=format_name,
        max_pixels=max_pixels,
        min_side=MIN_SIDE,
        memory_bytes=MEMORY_BYTES,
        limit_s=limit_s,
        import_path=_import_path(),
    )
    with _Child(order) as child:
        child.send(data)
        size = _checked_size(child.read_header(), order)
        return child.read_image(size)


@cache
def _import_path() -> tuple[str, ...]:
    """The folders that hold what the child imports, be it installed, editable or neither."""
    specs = [find_spec(name) for name in ("PIL", "numpy", "redux_pipelines")]
    found = [Path(spec.origin).absolute().parents[1] for spec in specs if spec and spec.origin]
    return tuple(dict.fromkeys(map(str, found)))


def is_starved(schedule: str, waited_s: float) -> bool:
    """Whether a process could have run, but had no processor, for half of ``waited_s``.

    Then it is the machine that is slow, not the picture. ``schedule`` is ``/proc/<pid>/schedstat``:
    nanoseconds on a processor, nanoseconds waiting for one, and how often it ran.
    """
    parts = schedule.split()
    return len(parts) == 3 and int(parts[1]) / 1e9 > waited_s / 2


def _format_error(data: bytes) -> DecodeError:
    accepted = ", ".join(accepted_formats())
    if not data:
        return DecodeError("empty", f"The picture is empty (0 bytes). Accepted are {accepted}.")
    return DecodeError(
        "format",
        f"The file seems to be {refusal_of(data)} ({len(data):,} bytes). Accepted are "
        f"{accepted}; convert it to one of these.",
    )


def _checked_size(header: dict[str, Any], order: Order) -> tuple[int, int]:
    """Read the child's verdict as untrusted input; return (width, height) or raise."""
    if "setup" in header:
        raise RuntimeError(f"the decoding process could not start: {header['setup']}")
    if "error" in header:
        raise _refusal(str(header["error"]), _numbers(header.get("numbers")), order)
    size = _numbers(header.get("size"))
    # EXIF may have turned the picture, so each limit must hold both ways round: they do.
    if len(size) != 2 or min(size) < order.min_side or size[0] * size[1] > order.max_pixels:
        raise _refusal("broken", [], order)
    return size[0], size[1]


def _numbers(value: object) -> list[int]:
    values = value if isinstance(value, list) else []
    return [number for number in values if type(number) is int and 0 <= number < 2**63]


def _refusal(slug: str, numbers: list[int], order: Order) -> DecodeError:
    match slug, numbers:
        case "pixels", [pixels]:
            given = f"has {pixels:,} pixels; at most {order.max_pixels:,} are accepted"
            return DecodeError("pixels", f"The picture {given}. Send a smaller one.")
        case "small", [width, height]:
            given = f"is {width} × {height} pixels"
            return DecodeError(
                "small", f"The picture {given}; each side must have at least {order.min_side}."
            )
        case "memory", _:
            return DecodeError(
                "memory",
                f"The {order.format} picture needs more than {order.memory_bytes >> 20:,} MiB to "
                "decode. Send a smaller or simpler one.",
            )
        case "slow", _:
            return DecodeError(
                "slow",
                f"The {order.format} picture took longer than {order.limit_s:g} s to decode. Send "
                "a smaller or simpler one.",
            )
    return DecodeError(
        "broken",
        f"The {order.format} picture is damaged, incomplete or of an unusual kind. Open it, save "
        f"it again and send that; accepted are {', '.join(accepted_formats())}.",
    )


class _Child:
    """One decoding process: a context manager that leaves neither process nor zombie behind."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._began_at = time.monotonic()
        self._ends_at = self._began_at + order.limit_s
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                "-B",
                os.path.abspath(decode_child.__file__),
                order.to_json(),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env=CHILD_ENVIRONMENT,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)
            with suppress(OSError, AttributeError):  # only fewer, larger reads
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()
        self._process.wait()

    def send(self, data: bytes) -> None:
        """Write all of ``data`` and end the input; an early end of the child shows on reading."""
        view = memoryview(data)
        with suppress(BrokenPipeError):
            while view:
                self._wait_for(self._stdin.fileno(), select.POLLOUT)
                view = view[os.write(self._stdin.fileno(), view) :]
        self._stdin.close()

    def read_header(self) -> dict[str, Any]:
        """The first line of the answer, as far as it is a JSON object."""
        line = bytearray(HEADER_BYTES)
        self._fill(memoryview(line))
        try:
            header = json.loads(line)
        except ValueError:
            header = None
        return header if isinstance(header, dict) else {}

    def read_image(self, size: tuple[int, int]) -> Image.Image:
        """The rows after the header, strip by strip, so that they are never here twice."""
        width, height = size
        image = Image.new("RGB", size)
        rows = max(1, STRIP_BYTES // (3 * width))
        for top in range(0, height, rows):
            shape = (width, min(rows, height - top))
            strip = bytearray(3 * shape[0] * shape[1])
            self._fill(memoryview(strip))
            image.paste(Image.frombuffer("RGB", shape, strip, "raw", "RGB", 0, 1), (0, top))
        return image

    def _fill(self, view: memoryview) -> None:
        while view:
            self._wait_for(self._stdout.fileno(), select.POLLIN)
            count = os.readv(self._stdout.fileno(), [view])
            if count == 0:
                raise self._early_end()
            view = view[count:]

    def _wait_for(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        while not poll.poll(max(0.0, self._ends_at - time.monotonic()) * 1000):
            waited_s = time.monotonic() - self._began_at
            most_s = STARVED_FACTOR * self._order.limit_s
            if waited_s >= most_s or not is_starved(self._schedule(), waited_s):
                raise _refusal("slow", [], self._order)
            self._ends_at = time.monotonic() + self._order.limit_s / 2

    def _schedule(self) -> str:
        with suppress(OSError):  # a system that does not tell
            return Path(f"/proc/{self._process.pid}/schedstat").read_text()
        return ""

    def _early_end(self) -> DecodeError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        slow = self._process.returncode == -signal.SIGXCPU
        return _refusal("slow" if slow else "broken", [], self._order)
