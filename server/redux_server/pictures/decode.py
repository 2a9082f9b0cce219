"""Turn a caller's bytes into an RGB picture, or say what is wrong with them.

The bytes are decoded in a process of their own that is small, confined and killed at a limit (see
``decode_child``); what it answers is checked as strictly as the bytes were. All decoders of this
process and the pictures that come of them share one budget of memory. Knows nothing of where the
bytes came from.
"""

import fcntl
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog
from PIL import Image, features

from redux_pipelines.errors import ImageError
from redux_server.pictures import decode_child, dimensions
from redux_server.pictures.decode_child import HEADER_BYTES, Order
from redux_server.pictures.memory_budget import MemoryBudget, NoMemoryInTime, return_freed
from redux_server.pictures.pixels import WHOLE_PIXELS

MAX_PIXELS = 100_000_000
"""By default, of a picture; ``--max-image-pixels`` is another."""
MIN_SIDE = 16
LIMIT_S = 10.0
STARVED_FACTOR = 6  # so many times longer may a picture take on a machine that has no time for it
MEMORY = MemoryBudget(800 * 2**20)
"""What decoding may use of this machine's memory: all processes at a time, and their pictures."""
WAIT_S = 120.0  # for a turn
PAUSES_S = (0.1, 1.0)  # before a decoder that was lost is started again
PIPE_BYTES = 2**20
STRIP_BYTES = 2**20  # that are read of a picture at a time
_TICK_S = 0.5
_MANY_PIXELS = 2_000_000  # 8 MB, for which it is worth some milliseconds to have the memory back
# What a decoder holds at its peak for each pixel: 4 bytes of Pillow, and what its codec needs.
# Measured at 36 MP, over kinds of each format (of AVIF with 8 bits; what 10 bits need is added).
# Here the picture and a copy of it come after that, and are less.
_BYTES_PER_PIXEL = {
    **{"AVIF": 22, "BMP": 8, "GIF": 8, "HEIC": 8, "JPEG": 13, "PNG": 9, "TIFF": 11, "WEBP": 18}
}
# The same for each pixel in the file of pictures of which a smaller copy is made, measured at
# 100 MP: a progressive JPEG holds coefficients of all pixels, the others are decoded whole and
# made smaller strip by strip. The codecs that are not here need too much for the whole.
_REDUCED_BYTES_PER_PIXEL = {"BMP": 6, "GIF": 6, "HEIC": 6, "JPEG": 7, "PNG": 5, "TIFF": 8}
_BESIDE_PIXELS_BYTES = 64 * 2**20  # interpreter, stacks of two threads, tables, a strip
# Nothing of ours, secrets least of all. Threads would reserve address space per processor core.
CHILD_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}

T = TypeVar("T")
_log = structlog.get_logger("redux_server.pictures.decode")
_AVIF_BRANDS = (b"avif", b"avis")
# ISO/IEC 23008-12, annexes B and H: of HEVC, and of any codec, which files of phones say, too.
_HEIC_BRANDS = tuple(b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split())
# By the kernel, which has no memory left, or by a person. A picture causes none of these.
_KILLED = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT)
_ACCEPTED_MAGIC = (
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]")),
    ("BMP", re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL)),
)
_REFUSED_MAGIC = (
    ("an AVIF picture", re.compile(rb"....ftypavi[fs]", re.DOTALL)),
    (
        "a HEIC picture, for which this server lacks the package pillow-heif",
        re.compile(rb"....ftyp(?:hei|hev|mif1|msf1)", re.DOTALL),
    ),
    ("a video", re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL)),
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


class DecoderUnavailable(Exception):
    """It is the machine, not the picture: this one may well be decoded later."""


class _Lost(Exception):
    """A decoding process that did not come to its end, through no fault of the picture."""


class _Larger(Exception):
    """A picture that has more pixels than its header seemed to say."""

    def __init__(self, pixels: int) -> None:
        super().__init__(pixels)
        self.pixels = pixels


def accepted_formats() -> tuple[str, ...]:
    """The formats ``decode_image`` takes: HEIC with pillow-heif, AVIF if this Pillow has it."""
    names = [name for name, _ in _ACCEPTED_MAGIC]
    names += ["HEIC"] * _has_heif() + ["AVIF"] * bool(features.check("avif"))
    return tuple(names)


def _has_heif() -> bool:
    """Whether pillow-heif is installed; only the process that decodes imports it."""
    return find_spec("pillow_heif") is not None


def sniff(data: bytes) -> str | None:
    """Name the format by its first bytes, or None for any that is not accepted."""
    head = data[:64]
    for name, magic in _ACCEPTED_MAGIC:
        if magic.match(head):
            return name
    brands = _brands(head)
    if any(brand in _AVIF_BRANDS for brand in brands):
        return "AVIF" if features.check("avif") else None
    is_heic = any(brand in _HEIC_BRANDS for brand in brands)
    return "HEIC" if is_heic and _has_heif() else None


def refusal_of(data: bytes) -> str:
    """What bytes that ``sniff`` does not accept seem to be, as in "an HTML page"."""
    head = data[:1024]
    return next((name for name, magic in _REFUSED_MAGIC if magic.match(head)), "no known picture")


def _brands(head: bytes) -> list[bytes]:
    """Which kinds of ISO base media a file says that it is, the main one first."""
    if head[4:8] != b"ftyp":
        return []
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return [head[8:12], *(head[at : at + 4] for at in range(16, end, 4))]


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, limit_s: float = LIMIT_S
) -> Image.Image:
    """Decode ``data`` to mode RGB: turned as its EXIF says, on white, without metadata.

    Of an animation the first frame. ``limit_s`` bounds the processor time, and the wall-clock time
    as well unless the machine gave the process no processor.

    Raises:
        DecodeError: the bytes are no acceptable picture.
        DecoderUnavailable: there was no memory for it in time, or decoders were killed each time.
        RuntimeError: the decoding process could not start (an installation fault).
    """
    return decode_and(lambda image: image, data, max_pixels=max_pixels, limit_s=limit_s)


def decode_and(
    use: Callable[[Image.Image], T],
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    limit_s: float = LIMIT_S,
    memory: MemoryBudget = MEMORY,
    wait_s: float = WAIT_S,
) -> T:
    """What ``use`` makes of the picture in ``data``, whose memory is reserved until then.

    Raises as ``decode_image`` does, and what ``use`` does.
    """
    format_name = sniff(data)
    if format_name is None:
        raise _format_error(data)
    at_least = 0
    if format_name not in _REDUCED_BYTES_PER_PIXEL:
        max_pixels = min(max_pixels, WHOLE_PIXELS)
    pixels = min(dimensions.pixels(format_name, data) or max_pixels, max_pixels)
    while True:
        needed = max(at_least, _needed_bytes(format_name, pixels, len(data)))
        order = Order(
            format=format_name,
            max_pixels=max_pixels,
            min_side=MIN_SIDE,
            memory_bytes=min(needed, memory.total_bytes),
            limit_s=limit_s,
            import_path=_import_path(),
            expected_pixels=pixels,
        )
        try:
            return _use_in_turn(use, data, order, memory, wait_s)
        except _Larger as error:
            pixels = error.pixels
        except DecodeError as error:
            if error.reason != "memory" or needed >= memory.total_bytes:
                raise
            at_least = memory.total_bytes  # an unusual file: with all that there is


def _needed_bytes(format_name: str, pixels: int, file_bytes: int) -> int:
    """The memory of a decoder and its picture, of whose file there are copies here and there."""
    needed = _BYTES_PER_PIXEL[format_name] * min(pixels, WHOLE_PIXELS)
    if pixels > WHOLE_PIXELS:
        needed = max(needed, _REDUCED_BYTES_PER_PIXEL[format_name] * pixels)
    return needed + 3 * file_bytes + _BESIDE_PIXELS_BYTES


def _use_in_turn(
    use: Callable[[Image.Image], T], data: bytes, order: Order, memory: MemoryBudget, wait_s: float
) -> T:
    """``use`` the picture; a process that is lost is started again, once for each pause."""
    for pause_s in (*PAUSES_S, None):
        try:
            with memory.reserve(order.memory_bytes, wait_s=wait_s):
                try:
                    return use(_decoded(data, order))
                finally:
                    if order.expected_pixels >= _MANY_PIXELS:
                        return_freed()
        except NoMemoryInTime:
            raise DecoderUnavailable(
                f"{wait_s:g} s were not enough for a turn: other pictures are being decoded in all "
                f"of the {memory.total_bytes >> 20:,} MiB that there are for it"
            ) from None
        except _Lost as lost:
            if pause_s is None:
                raise DecoderUnavailable(str(lost)) from lost
            _log.warning("a decoding process was lost and is started again", reason=str(lost))
            time.sleep(pause_s)
    raise AssertionError("the last pause is None")


def _decoded(data: bytes, order: Order) -> Image.Image:
    try:
        child = _Child(order)
    except OSError as error:  # no process, descriptor or memory is left
        raise _Lost(f"a decoding process could not be started: {error.strerror}") from error
    with child:
        child.send(data)
        header = child.read_header()
        _note_confinement(header)
        size = _checked_size(header, order)
        try:
            return child.read_image(size)
        except MemoryError:
            raise _Lost("there was no memory for a picture that was decoded") from None


def confinement_gap() -> str:
    """Why decoders of this machine are not held to a list of system calls, or ``""``.

    Decodes a picture to find out. Raises as ``decode_image`` does.
    """
    picture = io.BytesIO()
    Image.new("L", (MIN_SIDE, MIN_SIDE)).save(picture, "BMP")
    decode_image(picture.getvalue())
    return next(iter(_gaps), "")


_gaps: dict[str, None] = {}


def _note_confinement(header: dict[str, Any]) -> None:
    gap = str(header.get("unconfined") or "")[:200]
    if gap and not _gaps:  # once: it is the same for each
        _gaps[gap] = None
        _log.warning("pictures are decoded without a filter for system calls", reason=gap)


@cache
def _import_path() -> tuple[str, ...]:
    """The folders that hold what the child imports, be it installed, editable or neither."""
    names = ("PIL", "numpy", "pillow_heif", "redux_pipelines", "redux_server")
    specs = [find_spec(name) for name in names]
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
        reason = f"the decoding process could not start: {header['setup']}"
        raise _Lost(reason) if header.get("passing") else RuntimeError(reason)
    if "error" in header:
        numbers = _numbers(header.get("numbers"))
        if header["error"] == "larger" and order.expected_pixels < sum(numbers) <= order.max_pixels:
            raise _Larger(sum(numbers))
        raise _refusal(str(header["error"]), numbers, order)
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
            if order.format not in _REDUCED_BYTES_PER_PIXEL:
                given += f" as {order.format}"
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
        self._waited_s = 0.0
        self._left_s = order.limit_s
        self._has_answered = False
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
        self._has_answered = True
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
        while not self._is_ready(poll):
            if self._left_s > 0:
                continue
            most_s = STARVED_FACTOR * self._order.limit_s
            if self._waited_s >= most_s or not is_starved(self._schedule(), self._waited_s):
                raise _refusal("slow", [], self._order)
            self._left_s = self._order.limit_s / 2

    def _is_ready(self, poll: "select.poll") -> bool:
        """Wait a little. Time in which this very process did not run is not the picture's."""
        began_at = time.monotonic()
        is_ready = bool(poll.poll(max(0.0, min(_TICK_S, self._left_s)) * 1000))
        passed_s = min(time.monotonic() - began_at, 2 * _TICK_S)
        self._waited_s += passed_s
        self._left_s -= passed_s
        return is_ready

    def _schedule(self) -> str:
        with suppress(OSError):  # a system that does not tell
            return Path(f"/proc/{self._process.pid}/schedstat").read_text()
        return ""

    def _early_end(self) -> DecodeError | _Lost:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        status = self._process.returncode
        if status in _KILLED:
            return _Lost(f"a decoding process was killed ({signal.Signals(-status).name})")
        if status and status > 0 and not self._has_answered:
            return _Lost(f"a decoding process ended before it began (exit status {status})")
        return _refusal("slow" if status == -signal.SIGXCPU else "broken", [], self._order)
