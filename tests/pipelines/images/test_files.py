"""Every kind of file says where it comes from, holds the picture, and is the same each time."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import ExifTags, Image

from redux_pipelines.contract.types import OUTPUT_FORMATS
from redux_pipelines.images.files import encode
from redux_pipelines.images.rgb import DIGITAL_SOURCE_TYPE, encode_png

PICTURE = Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 60).convert("RGB")
GIVEN = {"Software": "FLUX Redux Server", "Seed": "7", "Model": "mini"}
LOSSY = ("jpeg", "webp")


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_png_is_the_default_and_without_loss():
    assert encode(PICTURE, GIVEN) == encode_png(PICTURE, GIVEN)
    assert np.array_equal(np.asarray(opened(encode(PICTURE, GIVEN))), np.asarray(PICTURE))


@pytest.mark.parametrize("kind", LOSSY)
def test_words_are_in_the_exif(kind):
    image = opened(encode(PICTURE, GIVEN, kind))
    assert (image.format, image.mode, image.size) == (kind.upper(), "RGB", PICTURE.size)
    exif = image.getexif()
    assert exif[ExifTags.Base.Software] == "FLUX Redux Server"
    said = dict(line.split(": ", 1) for line in exif[ExifTags.Base.ImageDescription].splitlines())
    assert said == {"AI-Generated": "true", **GIVEN}


@pytest.mark.parametrize("kind", LOSSY)
def test_xmp_states_the_digital_source_type(kind):
    (description,) = ElementTree.fromstring(opened(encode(PICTURE, {}, kind)).info["xmp"]).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    assert description.get(name) == DIGITAL_SOURCE_TYPE


@pytest.mark.parametrize("kind", LOSSY)
def test_loss_is_hardly_seen(kind):
    ours = np.asarray(opened(encode(PICTURE, GIVEN, kind)), float)
    error = ((ours - np.asarray(PICTURE, float)) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 36


@pytest.mark.parametrize("kind", OUTPUT_FORMATS)
def test_same_picture_is_the_same_bytes(kind):
    assert encode(PICTURE, GIVEN, kind) == encode(PICTURE.copy(), dict(GIVEN), kind)


@pytest.mark.parametrize("kind", LOSSY)
def test_words_beyond_ascii_do_no_harm(kind):
    exif = opened(encode(PICTURE, {"Model": "mini–狐"}, kind)).getexif()
    assert exif[ExifTags.Base.ImageDescription].endswith("Model: mini??")
