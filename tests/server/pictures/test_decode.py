import errno
import itertools
import os
import resource
import struct
import subprocess
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from redux_server.pictures import decode
from redux_server.pictures.decode import (
    DecodeError,
    DecoderUnavailable,
    accepted_formats,
    decode_and,
    decode_image,
    sniff,
)
from redux_server.pictures.memory_budget import MemoryBudget
from server.hostile_images import bombs, chunk, encoded, gradient, mutated

RETRY_WORDS = ("timeout", "connection", "http 5", "http 429")


def png(width, height, body=b"", *, depth=8, color=2, extra=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


def refusal(data, **options):
    with pytest.raises(DecodeError) as caught:
        decode_image(data, **options)
    message = caught.value.public_message
    assert str(caught.value) == message and len(message) < 400
    assert not any(word in message.lower() for word in RETRY_WORDS)
    return caught.value


def assert_close(image, expected, tolerance=12):
    assert (image.mode, image.size) == ("RGB", expected.size)
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected.convert("RGB")))
    assert difference.mean() < tolerance


def test_time_in_which_we_did_not_run_ourselves_is_not_the_pictures(monkeypatch):
    """As of a worker that was stopped, or whose machine slept, in the middle of a picture."""
    steady, looks = time.monotonic, itertools.count()
    monkeypatch.setattr(decode.time, "monotonic", lambda: steady() + 100 * (next(looks) // 5))
    picture = Image.new("RGB", (1600, 1200), "teal")  # more than a pipe holds
    assert decode_image(encoded(picture, "PNG"), limit_s=60).size == picture.size


def our_processes():
    """What this process started and has not waited for, zombies included, by any of its threads."""
    lists = Path("/proc/self/task").glob("*/children")
    found: set[str] = set()
    for path in lists:
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= set(path.read_text().split())
    return found


@pytest.fixture(autouse=True)
def no_process_is_left():
    processes, files = our_processes(), len(os.listdir("/proc/self/fd"))
    yield
    assert our_processes() <= processes
    assert len(os.listdir("/proc/self/fd")) <= files


@pytest.mark.parametrize("format_name", accepted_formats())
def test_accepted_formats_are_decoded(format_name):
    data = encoded(gradient(), format_name)
    assert sniff(data) == format_name
    assert_close(decode_image(data), gradient())


def test_result_has_no_metadata():
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    image = decode_image(encoded(gradient(), "JPEG", exif=exif, comment=b"secret", dpi=(72, 72)))
    assert image.info == {} and not image.getexif()


def test_cmyk_jpeg():
    assert_close(decode_image(encoded(gradient().convert("CMYK"), "JPEG")), gradient())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_png_modes(mode):
    if mode == "I;16":
        values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
        source, expected = Image.fromarray(values), Image.fromarray((values >> 8).astype(np.uint8))
    else:
        source = gradient().convert(mode)
        expected = source
    assert_close(decode_image(encoded(source, "PNG")), expected, tolerance=2)


def test_16_bit_rgb_png():
    rows = b"".join(b"\0" + b"\x80\x00\xff\xff\x00\x00" * 20 for _ in range(20))
    assert decode_image(png(20, 20, rows, depth=16)).getpixel((5, 5)) == (128, 255, 0)


def test_transparent_palette_is_flattened_onto_white():
    source = Image.new("P", (32, 32), 0)
    source.putpalette([200, 0, 0, 0, 0, 250])
    source.paste(1, (0, 0, 16, 32))
    image = decode_image(encoded(source, "PNG", transparency=b"\x00\xff"))
    assert image.getpixel((3, 3)) == (0, 0, 250) and image.getpixel((20, 3)) == (255, 255, 255)


def test_half_transparent_pixels_are_mixed_with_white():
    image = decode_image(encoded(Image.new("RGBA", (32, 32), (0, 0, 0, 128)), "PNG"))
    assert image.getpixel((3, 3)) == pytest.approx((127, 127, 127), abs=1)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(format_name):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode_image(encoded(gradient(64, 48), format_name, exif=exif))
    assert_close(image, gradient(64, 48).transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format_name):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")]
    data = encoded(frames[0], format_name, save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data).getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=3)


def test_broken_exif_does_not_spoil_a_sound_picture():
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9)
    assert_close(decode_image(data), gradient())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"<?xml version='1.0'?>\n<svg width='9'/>", "an SVG drawing"),
        (b"<!DOCTYPE html><html><body>login</body></html>", "an HTML page"),
        (b"<html><img src=x onerror=alert(1)></html>", "an HTML page"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a PDF document"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "a video"),
        (b"\x1a\x45\xdf\xa3\x01\0\0\0", "a video"),
        (b"8BPS\0\x01", "a Photoshop file"),
        (b"\0\0\x01\0\x01\0", "an icon file"),
        (b"PK\x03\x04", "an archive"),
        (b"\x1f\x8b\x08", "an archive"),
        (b'{"error": "not found"}', "a JSON text"),
        (b"hello, this is no picture", "a text"),
        (b"P6\n16 16\n255\n", "no known picture"),
        (bytes(64), "no known picture"),
        (b"\xff\x0a\xfa\x7f", "a JPEG XL picture"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture"),
    ],
)
def test_other_files_are_named_and_refused_without_a_process(data, words, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert sniff(data) is None
    error = refusal(data)
    assert error.reason == "format" and words in str(error) and "PNG, JPEG" in str(error)


def test_empty_bytes():
    assert refusal(b"").reason == "empty"


def test_avif_is_refused_where_pillow_lacks_it(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    assert "AVIF" not in accepted_formats()
    assert "an AVIF picture" in str(refusal(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf"))


def test_heic_is_refused_where_its_package_is_missing(monkeypatch):
    real = decode.find_spec
    missing = {"pillow_heif"}
    monkeypatch.setattr(decode, "find_spec", lambda name: None if name in missing else real(name))
    decode._import_path.cache_clear()
    assert "HEIC" not in accepted_formats()
    error = refusal(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert error.reason == "format" and "pillow-heif" in str(error)
    assert decode_image(encoded(gradient(), "PNG")).size == (64, 48), "others need it not"
    decode._import_path.cache_clear()


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_small_pictures_are_refused(size):
    error = refusal(encoded(Image.new("RGB", size), "PNG"))
    assert error.reason == "small" and f"{size[0]} × {size[1]}" in str(error) and "16" in str(error)


def test_smallest_accepted_picture():
    assert decode_image(encoded(Image.new("RGB", (16, 16)), "PNG")).size == (16, 16)


@pytest.mark.parametrize(
    "data",
    [
        png(10_001, 10_000),
        png(12_000, 12_000),
        png(50_000, 50_000),
        png(2**31 - 1, 2**31 - 1),
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
        b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 50000, 50000, 1, 24, 0, 0, 0, 0, 0, 0),
    ],
    ids=["100MP", "144MP", "2500MP", "huge", "gif", "bmp"],
)
def test_bombs_are_refused_by_their_header(data):
    error = refusal(data)
    assert error.reason == "pixels" and "100,000,000" in str(error)


@pytest.mark.parametrize("format_name", ["WEBP", "AVIF"])
def test_what_cannot_be_made_smaller_on_the_way_has_a_lower_limit(format_name, monkeypatch):
    monkeypatch.setattr(decode, "WHOLE_PIXELS", 64 * 47)
    error = refusal(encoded(gradient(), format_name))
    assert error.reason == "pixels" and f"at most 3,008 are accepted as {format_name}" in str(error)


def test_max_pixels_is_exact():
    data = encoded(Image.new("RGB", (64, 64)), "PNG")
    assert decode_image(data, max_pixels=4096).size == (64, 64)
    assert "4,096 pixels; at most 4,095" in str(refusal(data, max_pixels=4095))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_compressed_chunk_that_unpacks_to_200_mb(kind):
    packer = zlib.compressobj()
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(200)) + packer.flush()
    prefix = b"k\0\1\0\0\0" if kind == b"iTXt" else b"k\0\0"
    rows = b"".join(b"\0" + bytes(60) for _ in range(20))
    data = png(20, 20, rows, extra=chunk(kind, prefix + packed))
    try:
        assert decode_image(data).size == (20, 20)
    except DecodeError as error:
        assert error.reason in ("broken", "memory")


def test_idat_longer_than_the_picture_is_not_unpacked():
    assert decode_image(png(20, 20, bytes(64 * 2**20))).size == (20, 20)


def test_png_without_enough_rows_is_refused():
    assert refusal(png(4000, 4000, bytes(100))).reason == "broken"


@pytest.mark.parametrize("format_name", accepted_formats())
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_truncated_files_are_refused(format_name, share):
    data = encoded(gradient(), format_name)
    assert refusal(data[: max(14, int(len(data) * share))]).reason in ("broken", "format")


def test_html_behind_a_gif_header_never_survives():
    polyglot = b"GIF89a/*" + b"<script>alert(1)</script>" * 20
    assert refusal(polyglot).reason in ("broken", "pixels", "small")


def test_html_behind_a_sound_picture_is_dropped():
    data = encoded(gradient(), "PNG") + b"<html><script>alert(1)</script></html>"
    assert_close(decode_image(data), gradient(), tolerance=1)


WORKERS = 2  # at a time: more would measure each other
SLOWEST_S = decode.LIMIT_S + 2  # the limit, and the child's start on a busy machine


def outcome(data):
    """``(reason or "decoded", seconds)``; anything but a picture or a clear refusal is an error."""
    started = time.monotonic()
    try:
        image = decode_image(data)
    except DecodeError as error:
        text = error.public_message
        assert text and text == str(error) and len(text) < 400
        assert not any(word in text.lower() for word in RETRY_WORDS)
        ended = error.reason
    else:
        assert image.mode == "RGB" and image.width * image.height <= decode.MAX_PIXELS
        ended = "decoded"
    return ended, time.monotonic() - started


def check_hostile(files):
    """Every file decodes or is refused within the limit, and this process lives to say so."""
    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(outcome, files))
    counts = Counter(reason for reason, _ in results)
    slowest = max(seconds for _, seconds in results)
    print(f"{len(results)} files, slowest {slowest:.2f} s:", dict(counts))
    assert slowest < SLOWEST_S
    assert set(counts) <= {"decoded", "broken", "format", "pixels", "small", "memory", "slow"}
    return counts


def check_mutations(count, seed):
    counts = check_hostile(mutated(count, seed))
    assert sum(counts.values()) == count
    # Neither of these alone would mean that the files were looked into.
    assert min(counts["decoded"], counts["broken"]) > count // 10
    assert counts["slow"] == 0


def test_mutated_pictures_fail_clearly_or_decode():
    check_mutations(150, seed=1)


@pytest.mark.slow
def test_many_mutated_pictures_fail_clearly_or_decode():
    check_mutations(int(os.environ.get("REDUX_TEST_MUTATIONS", "10000")), seed=2)


@pytest.mark.parametrize("name", bombs())
def test_bomb_is_refused_or_harmless(name):
    """In seconds of a processor, as a busy machine may make any file slow."""
    data = bombs()[name]
    assert len(data) < 2**20, "a small file"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    check_hostile([data])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{spent_s:.2f} s of a processor")
    assert spent_s < 2


def test_mutations_are_the_same_again():
    assert list(mutated(50, seed=3)) == list(mutated(50, seed=3)) != list(mutated(50, seed=4))


@pytest.mark.slow
@pytest.mark.parametrize("format_name", accepted_formats())
def test_largest_legal_picture_stays_within_the_limits(format_name):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"speed": 10} if format_name == "AVIF" else {}
    if format_name in ("JPEG", "PNG", "WEBP"):
        options["exif"] = exif
    source = Image.new("RGBA", (8000, 5000), (9, 99, 199, 128))
    source = source.convert("RGB") if format_name in ("JPEG", "BMP") else source
    image = decode_image(encoded(source, format_name, **options), limit_s=60)
    assert image.size == ((5000, 8000) if "exif" in options else (8000, 5000))


def fake_child(monkeypatch, tmp_path, code):
    script = tmp_path / "child.py"
    script.write_text(f"import json, os, sys, time\nHEADER = {decode.HEADER_BYTES}\n{code}\n")
    monkeypatch.setattr(decode.decode_child, "__file__", str(script))


def header(text):
    return f"os.write(1, {text.encode()!r}.ljust(HEADER - 1) + b'\\n')"


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "os.abort()",
        "os.close(0); os.close(1)",
        "os.write(1, b'short')",
        "os.write(1, bytes(HEADER))",
        header("[1, 2]"),
        header('{"size": [64, 48]}'),
        header('{"size": [64, 48]}') + "; os.write(1, bytes(100))",
        header('{"size": [1000000, 1000000]}'),
        header('{"size": [-64, -48]}'),
        header('{"size": [64.0, "48"]}'),
        header('{"size": [64]}'),
        header('{"size": [1, 1]}'),
        header('{"error": "pixels", "numbers": ["<b>"]}'),
        header('{"error": "no such slug"}'),
    ],
)
def test_a_child_that_lies_or_dies_is_a_broken_picture(code, monkeypatch, tmp_path):
    fake_child(monkeypatch, tmp_path, code)
    assert refusal(encoded(gradient(), "PNG")).reason == "broken"


@pytest.mark.parametrize(
    "code",
    [
        "time.sleep(60)",
        "sys.stdin.buffer.read(); time.sleep(60)",
        header('{"size": [64, 48]}') + "; time.sleep(60)",
        "os.fork(); time.sleep(60)",
        "os.fork() or os.setsid(); time.sleep(3)",
    ],
)
def test_a_child_that_hangs_is_killed(code, monkeypatch, tmp_path):
    fake_child(monkeypatch, tmp_path, code)
    data = encoded(gradient(), "PNG") + bytes(4 * 2**20)  # more than a pipe holds
    error = refusal(data, limit_s=0.6)
    assert error.reason == "slow" and "longer than 0.6 s" in str(error)


@pytest.mark.parametrize(
    ("schedule", "waited_s", "expected"),
    [
        ("500000000 9000000000 40\n", 10.0, True),  # half a second's work, nine seconds in line
        ("9900000000 90000000 40\n", 10.0, False),  # it worked all the time
        ("1000000 1000000 2\n", 10.0, False),  # it slept
        ("", 10.0, False),  # a system that does not tell
    ],
)
def test_a_child_without_a_processor_is_told_from_one_that_is_slow(schedule, waited_s, expected):
    assert decode.is_starved(schedule, waited_s) is expected


@pytest.mark.parametrize("starved", [False, True])
def test_a_starved_child_has_more_time_but_not_for_ever(starved, monkeypatch, tmp_path):
    fake_child(monkeypatch, tmp_path, "time.sleep(60)")
    asked = []

    def is_starved(schedule, waited_s):
        asked.append(schedule)
        return starved

    monkeypatch.setattr(decode, "is_starved", is_starved)
    began = time.monotonic()
    assert refusal(encoded(gradient(), "PNG"), limit_s=0.2).reason == "slow"
    assert (time.monotonic() - began > 0.2 * decode.STARVED_FACTOR) is starved
    assert not Path("/proc/self/schedstat").exists() or len(asked[0].split()) == 3


def test_a_child_that_cannot_start_is_our_fault(monkeypatch, tmp_path):
    fake_child(monkeypatch, tmp_path, header('{"setup": "ModuleNotFoundError(PIL)"}'))
    with pytest.raises(RuntimeError, match="could not start"):
        decode_image(encoded(gradient(), "PNG"))


def test_memory_limit_is_a_clear_error():
    data = png(6000, 6000, b"".join(b"\0" + bytes(18000) for _ in range(6000)))
    with pytest.raises(DecodeError, match="more than 100 MiB") as caught:
        decode_and(lambda image: image, data, memory=MemoryBudget(100 * 2**20))
    assert caught.value.reason == "memory"


# --- the machine, not the picture -----------------------------------------------------------------


@pytest.fixture
def without_pauses(monkeypatch):
    monkeypatch.setattr(decode, "PAUSES_S", (0.0, 0.0))


def dying_at_first(monkeypatch, tmp_path, deaths, times):
    """A decoder that dies so at its first ``times`` starts, and is the real one afterwards."""
    real = decode.decode_child.__file__
    died = tmp_path / "died"
    fake_child(
        monkeypatch,
        tmp_path,
        f"""
import pathlib, signal
died = pathlib.Path({str(died)!r})
count = int(died.read_text()) if died.exists() else 0
if count < {times}:
    died.write_text(str(count + 1))
    {deaths}
    time.sleep(60)
sys.path.insert(0, {os.path.dirname(real)!r})
import decode_child
decode_child.main()
""",
    )
    return died


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize(
    "death",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",  # as the OOM killer does
        "sys.stdin.buffer.read(); os.kill(os.getpid(), signal.SIGKILL)",
        header('{"size": [64, 48]}') + "; os.write(1, bytes(9)); os.kill(os.getpid(), 9)",
        "signal.signal(15, signal.SIG_DFL); os.kill(os.getpid(), 15)",
        "sys.exit(1)",  # an interpreter that found no memory to begin with
        header('{"setup": "OSError(24)", "passing": true}') + "; sys.exit()",
    ],
    ids=["at once", "with the file", "amid its answer", "politely", "too early", "full"],
)
def test_a_decoder_that_was_killed_is_started_again(death, monkeypatch, tmp_path):
    died = dying_at_first(monkeypatch, tmp_path, death, times=2)
    assert_close(decode_image(encoded(gradient(), "PNG")), gradient(), tolerance=1)
    assert died.read_text() == "2"


@pytest.mark.usefixtures("without_pauses")
def test_decoders_that_are_killed_each_time_are_no_damaged_picture(monkeypatch, tmp_path):
    died = dying_at_first(monkeypatch, tmp_path, "os.kill(os.getpid(), 9)", times=99)
    with pytest.raises(DecoderUnavailable, match="SIGKILL"):
        decode_image(encoded(gradient(), "PNG"))
    assert died.read_text() == "3", "three tries"


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE])
def test_a_machine_that_starts_no_process_is_no_damaged_picture(number, monkeypatch):
    real, tries = subprocess.Popen, []

    def popen(*args, **options):
        tries.append(1)
        if len(tries) <= failures:
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    failures = 2
    assert decode_image(encoded(gradient(), "PNG")).size == (64, 48)
    failures = 99
    with pytest.raises(DecoderUnavailable, match="could not be started"):
        decode_image(encoded(gradient(), "PNG"))


@pytest.mark.parametrize("death", ["os.abort()", "os.kill(os.getpid(), 11)"])
def test_a_decoder_that_crashes_is_not_started_again(death, monkeypatch, tmp_path):
    died = dying_at_first(monkeypatch, tmp_path, death, times=99)
    assert refusal(encoded(gradient(), "PNG")).reason == "broken"
    assert died.read_text() == "1"


# --- memory ---------------------------------------------------------------------------------------


def sparse(width, height):
    """A small file of a large picture with an alpha channel."""
    rows = zlib.compressobj(1)
    body = b"".join(rows.compress(bytes(1 + 4 * width)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", body), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def peak_bytes(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("it has ended")


def test_a_decoder_needs_no_more_than_was_reserved_for_it(monkeypatch):
    peaks, read = [], decode._Child.read_image

    def noting(child, size):
        image = read(child, size)
        peaks.append((peak_bytes(child._process.pid), child._order.memory_bytes))
        return image

    monkeypatch.setattr(decode._Child, "read_image", noting)
    decode_image(sparse(2500, 2000))
    [(peak, reserved)] = peaks
    assert 20 * 2**20 < peak < reserved + 32 * 2**20  # with the interpreter, which is shared
    assert reserved < 120 * 2**20, "a third of what it was with a copy for each step"


def test_pictures_in_the_works_never_need_more_than_there_is(monkeypatch):
    budget, room = MemoryBudget(250 * 2**20), []
    data = sparse(3000, 2000)

    def use(image):
        room.append(budget.free_bytes)
        return image.size

    with ThreadPoolExecutor(4) as pool:
        tries = [pool.submit(decode_and, use, data, memory=budget) for _ in range(4)]
        assert [each.result() for each in tries] == [(3000, 2000)] * 4
    reserved = decode._needed_bytes("PNG", 6_000_000, len(data))
    assert set(room) <= {250 * 2**20 - 2 * reserved, 250 * 2**20 - reserved}
    assert budget.free_bytes == budget.total_bytes, "all was given back"


def test_a_turn_that_does_not_come_is_no_damaged_picture():
    budget = MemoryBudget(2**20)
    with budget.reserve(1, wait_s=0), pytest.raises(DecoderUnavailable, match=r"0.01 s .* turn"):
        decode_and(lambda image: image, encoded(gradient(), "PNG"), memory=budget, wait_s=0.01)
    assert budget.free_bytes == budget.total_bytes


@pytest.mark.parametrize("seen", [None, 16 * 16, 10**9])
def test_a_header_that_was_misread_changes_nothing(seen, monkeypatch):
    """What the decoder itself finds counts, and it asks for more memory before it needs some."""
    monkeypatch.setattr(decode.dimensions, "pixels", lambda *_: seen)
    picture = gradient(1500, 1000)
    assert_close(decode_image(encoded(picture, "PNG")), picture, tolerance=1)
    assert "121,000,000 pixels" in str(refusal(png(11_000, 11_000)))


def test_an_unusual_picture_may_have_all_memory_that_there_is(monkeypatch):
    """One that needs more than its kind does: here of a kind that needs nothing, by our table."""
    monkeypatch.setattr(decode, "_BYTES_PER_PIXEL", {"PNG": 0})
    monkeypatch.setattr(decode, "_BESIDE_PIXELS_BYTES", 2**20)
    limits, init = [], decode._Child.__init__

    def noting(child, order):
        limits.append(order.memory_bytes)
        init(child, order)

    monkeypatch.setattr(decode._Child, "__init__", noting)
    with pytest.raises(DecodeError, match="needs more than 2 MiB"):
        decode_and(lambda image: image, sparse(2500, 2000), memory=MemoryBudget(2 * 2**20))
    budget = MemoryBudget(100 * 2**20)
    assert decode_and(lambda image: image.size, sparse(2500, 2000), memory=budget) == (2500, 2000)
    assert limits[-1] == 100 * 2**20 > 10 * limits[-2]


def test_the_child_sees_no_environment_and_can_open_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("REDUX_SECRET", "s3cret")
    monkeypatch.setenv("PYTHONSTARTUP", "/nonexistent")
    real = decode.decode_child.__file__
    fake_child(
        monkeypatch,
        tmp_path,
        f"""
import errno, importlib.util, socket
spec = importlib.util.spec_from_file_location("child", {real!r})
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
order = child.Order(**json.loads(sys.argv[1]))
sys.path.extend(order.import_path)
child._load_code("PNG", b"")
child._confine(order)
def fails(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return error.errno == errno.EPERM
assert fails(open, "/etc/passwd") and fails(socket.socket) and fails(os.pipe)
assert "REDUX_SECRET" not in os.environ
sys.stdin.buffer.read()
child._write_header({{"error": "small", "numbers": [7, 7]}})
""",
    )
    assert refusal(encoded(gradient(), "PNG")).reason == "small"
