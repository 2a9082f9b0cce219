"""Any PIL mode becomes upright opaque RGB; PNGs carry their provenance."""

import io

import numpy as np
import pytest
from PIL import Image

from redux_pipelines.errors import ImageError
from redux_pipelines.images import rgb
from redux_pipelines.images.rgb import DIGITAL_SOURCE_TYPE, centre_crop, encode_png, to_rgb

RED, WHITE = (255, 0, 0), (255, 255, 255)


def _through_file(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def _palette_with_hole():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return _through_file(image, "PNG", transparency=1)


def _array(values, dtype):
    return Image.fromarray(np.array([values], dtype))


MODES = {
    "RGB": (Image.new("RGB", (1, 1), RED), [RED]),
    "RGBX": (Image.new("RGBX", (1, 1), (*RED, 0)), [RED]),
    "RGBA clear": (Image.new("RGBA", (1, 1), (*RED, 0)), [WHITE]),
    "RGBA half": (Image.new("RGBA", (1, 1), (0, 0, 0, 128)), [(127, 127, 127)]),
    "RGBa": (Image.new("RGBA", (1, 1), (*RED, 255)).convert("RGBa"), [RED]),
    "RGB with a key colour": (
        _through_file(Image.new("RGB", (1, 1), RED), "PNG", transparency=RED),
        [WHITE],
    ),
    "L": (Image.new("L", (1, 1), 90), [(90, 90, 90)]),
    "LA": (Image.new("LA", (1, 1), (90, 0)), [WHITE]),
    "PA": (Image.new("P", (1, 1)).convert("PA"), [(0, 0, 0)]),
    "P": (Image.new("RGB", (1, 1), RED).convert("P", palette=Image.Palette.ADAPTIVE), [RED]),
    "P with a hole": (_palette_with_hole(), [RED, WHITE]),
    "1": (Image.new("1", (1, 1), 1), [WHITE]),
    "CMYK": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [RED]),
    "YCbCr": (Image.new("RGB", (1, 1), WHITE).convert("YCbCr"), [WHITE]),
    "HSV": (Image.new("RGB", (1, 1), RED).convert("HSV"), [RED]),
    "LAB": (Image.new("LAB", (1, 1), (128, 128, 128)), [(119, 119, 119)]),
    "I;16": (_array([0, 257, 65535], np.uint16), [(0,) * 3, (1,) * 3, WHITE]),
    "I of 16 bits": (_array([0, 25700, 70000], np.int32), [(0,) * 3, (100,) * 3, WHITE]),
    "I of 8 bits": (_array([0, 100, 255], np.int32), [(0,) * 3, (100,) * 3, WHITE]),
    "F to 1": (_array([0.0, 0.4, 1.0], np.float32), [(0,) * 3, (102,) * 3, WHITE]),
    "F to 255": (_array([-5.0, 102.0, 300.0], np.float32), [(0,) * 3, (102,) * 3, WHITE]),
    "F with NaN": (_array([np.nan, 1.0], np.float32), [(0,) * 3, WHITE]),
}


@pytest.mark.parametrize(("image", "colours"), MODES.values(), ids=MODES)
def test_every_mode_becomes_opaque_rgb(image, colours):
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.size == image.size
    assert [rgb.getpixel((x, 0)) for x in range(rgb.width)] == colours


def test_sixteen_bit_png_files_keep_their_brightness():
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16)[None])
    grey = np.asarray(to_rgb(_through_file(ramp, "PNG")))[0, :, 0]
    assert np.array_equal(grey, np.arange(256))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_dropped(orientation):
    upright = Image.new("RGB", (16, 8), RED)
    upright.paste(WHITE, (0, 0, 8, 4))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # as Image.Transpose
    stored = upright
    if orientation > 1:
        stored = upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb = to_rgb(_through_file(stored, "PNG", exif=exif))
    assert rgb.info == {}
    assert np.array_equal(np.asarray(rgb), np.asarray(upright))


def test_the_given_picture_is_not_changed():
    image = Image.new("RGBA", (2, 2), (*RED, 0))
    image.info["note"] = "kept"
    to_rgb(image)
    assert image.mode == "RGBA"
    assert image.info == {"note": "kept"}


def test_a_truncated_file_is_an_image_error():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    with pytest.raises(ImageError, match="cannot be decoded"):
        to_rgb(Image.open(io.BytesIO(buffer.getvalue()[:4000])))


def test_png_metadata_round_trips():
    image = Image.new("RGB", (4, 3), RED)
    given = {"Software": "FLUX Redux Server", "Prompt": "ein Fuchs – 狐", "Seed": "7"}
    read = Image.open(io.BytesIO(encode_png(image, given)))
    read.load()
    assert np.array_equal(np.asarray(read), np.asarray(image))
    assert {key: str(read.text[key]) for key in given} == given
    assert read.text["AI-Generated"] == "true"
    assert DIGITAL_SOURCE_TYPE in read.text["XML:com.adobe.xmp"]


def test_xmp_packet_is_well_formed_xml():
    from xml.etree import ElementTree

    read = Image.open(io.BytesIO(encode_png(Image.new("RGB", (1, 1)), {})))
    read.load()
    root = ElementTree.fromstring(str(read.text["XML:com.adobe.xmp"]).encode())
    (description,) = root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    assert description.get(name) == DIGITAL_SOURCE_TYPE


def test_centre_crop_leaves_a_fitting_picture_alone():
    image = Image.new("RGB", (8, 6))
    assert centre_crop(image, 8, 6) is image
    assert centre_crop(image, 5, 5).size == (5, 5)


def test_pixels_alone_are_not_copied_again():
    """A large picture is copied no more often than it must: it is 160 MB at 40 megapixels."""
    plain, levels = Image.new("RGB", (8, 6), "red"), Image.new("L", (8, 6), 77)
    assert rgb.to_rgb(plain) is plain and rgb.grey(levels) is levels
    plain.info["exif"] = b"something"
    levels.info["transparency"] = 77
    assert rgb.to_rgb(plain) is not plain and rgb.to_rgb(plain).info == {}
    assert rgb.grey(levels).getextrema() == (255, 255), "on white"


def test_a_picture_in_parts_is_the_picture():
    """As the process that decodes makes it, so as not to have it twice."""
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        source = Image.radial_gradient("L").convert("RGBA" if mode == "LA" else "RGB")
        source = source.convert("L").convert("I;16") if mode == "I;16" else source.convert(mode)
        whole = rgb.to_rgb(source)
        for top in range(0, 256, 100):
            box = (0, top, 256, min(256, top + 100))
            assert rgb.opaque_rgb(source.crop(box)).tobytes() == whole.crop(box).tobytes(), mode
