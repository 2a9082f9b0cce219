"""Preprocessing is transformers', for every shape and mode of picture."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from redux_pipelines.conditioning.image import Preprocessing
from redux_pipelines.errors import WeightsError


@pytest.fixture(scope="module")
def processor(tiny):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil.from_pretrained(tiny.redux / "feature_extractor")


@pytest.fixture(scope="module")
def preprocessing(tiny):
    return Preprocessing.read(tiny.redux / "feature_extractor" / "preprocessor_config.json")


@pytest.mark.parametrize("size", [(64, 64), (300, 100), (17, 900)], ids=str)
def test_pixels_are_those_of_transformers(size, processor, preprocessing):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    theirs = processor.preprocess(images=image, return_tensors="pt").pixel_values
    assert torch.equal(preprocessing.apply(image), theirs)


def test_transparent_pictures_are_seen_on_white(preprocessing):
    clear = Image.new("RGBA", (50, 50), (255, 0, 0, 0))
    assert torch.equal(preprocessing.apply(clear), torch.ones(1, 3, 64, 64))


def test_size_and_statistics_come_from_the_checkpoint(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    path.write_text(json.dumps({"size": {"width": 8, "height": 4}, **statistics}))
    pixels = Preprocessing.read(path).apply(Image.new("RGB", (9, 9)))
    assert pixels.shape == (1, 3, 4, 8)
    assert torch.allclose(pixels[0, :, 0, 0], torch.tensor([-0.1, -0.2, -0.3]))


def test_a_preprocessor_without_a_square_size_is_refused(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"size": {"shortest_edge": 8}}))
    with pytest.raises(WeightsError, match="usable size"):
        Preprocessing.read(path)


def test_tokens_depend_on_the_picture(pipeline, picture):
    encoder = pipeline._components.image_encoder
    tokens = encoder.encode(picture)
    assert tokens.shape == (16, 32)
    other = encoder.encode(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert (tokens - other).norm() > 0.2 * tokens.norm()
