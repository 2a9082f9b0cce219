"""What a header says of a picture's size, against what Pillow finds."""

import io
import struct

import pytest
from PIL import Image

from redux_server.pictures import dimensions
from redux_server.pictures.decode import accepted_formats, sniff
from server.hostile_images import bombs, encoded, gradient, mutated, originals

SIZES = [(16, 16), (301, 47), (47, 1301)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format_name", accepted_formats())
def test_pixels_are_those_that_pillow_finds(format_name: str, size: tuple[int, int]) -> None:
    data = encoded(gradient(*size), format_name)
    found = dimensions.pixels(format_name, data) or 0
    if format_name == "HEIC":  # what is coded, in blocks of 64 pixels, of which a part is shown
        size = (-(-size[0] // 64) * 64, -(-size[1] // 64) * 64)
        assert found <= size[0] * size[1] and found >= 16 * 16
    else:
        assert found == size[0] * size[1]


@pytest.mark.parametrize(
    ("format_name", "mode", "options"),
    [
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"exif": b"Exif\0\0" + bytes(40)}),
        ("JPEG", "RGB", {"progressive": True, "comment": b"c" * 60_000, "exif": bytes(60_000)}),
        ("JPEG", "RGB", {"icc_profile": bytes(150_000)}),
        ("JPEG", "CMYK", {"restart_marker_rows": 1}),
        ("BMP", "1", {}),
        ("PNG", "RGBA", {"icc_profile": bytes(9000)}),
    ],
)
def test_other_kinds_of_a_format_are_understood(
    format_name: str, mode: str, options: dict[str, object]
) -> None:
    data = encoded(gradient(333, 77).convert(mode), format_name, **options)
    assert dimensions.pixels(format_name, data) == 333 * 77


def test_a_bitmap_from_the_top_and_one_of_os2_are_understood() -> None:
    head = struct.pack("<IHHI", 99, 0, 0, 54)
    top_down = b"BM" + head + struct.pack("<IiiHH", 40, 64, -48, 1, 24)
    os2 = b"BM" + head + struct.pack("<IHHHH", 12, 64, 48, 1, 24)
    assert [dimensions.pixels("BMP", each) for each in (top_down, os2)] == [64 * 48] * 2


def test_no_file_of_any_kind_is_too_much_for_it() -> None:
    """None or a number, at once, and never less than Pillow finds where it is a sound picture."""
    cut = [data[:length] for data in originals() for length in range(0, 64, 3)]
    for data in [*mutated(400, seed=5), *bombs().values(), *cut]:
        for format_name in accepted_formats():
            found = dimensions.pixels(format_name, data)
            assert found is None or found > 0
    for data in originals():
        if sniff(data) == "HEIC":  # of which Pillow knows nothing
            continue
        with Image.open(io.BytesIO(data)) as image:
            assert dimensions.pixels(sniff(data) or "", data) == image.width * image.height


def test_markers_of_a_jpeg_that_never_end_are_given_up() -> None:
    assert dimensions.pixels("JPEG", b"\xff\xd8" + b"\xff\xd0" * 10**6) is None
    assert dimensions.pixels("JPEG", b"\xff\xd8" + b"\xff\xe0\0\0" * 10**6) is None
