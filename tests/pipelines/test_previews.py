"""Previews of latents: the arithmetic against its definition, and whose maps there are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from redux_pipelines import sampling
from redux_pipelines.contract.types import GenerationRequest, Progress, Result
from redux_pipelines.errors import WeightsError
from redux_pipelines.loading.load import load_pipeline
from redux_pipelines.previews import FILE, LatentColours, latent_colours
from redux_pipelines.sampling import Grid
from redux_weights.embedded import find_mini

CPU = torch.device("cpu")
FLUX = {
    "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512],
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


@pytest.mark.parametrize("sigma", [0.9, 0.25, 0.0])
def test_noise_is_taken_out_before_colours_are_made(sigma: float) -> None:
    grid = Grid(rows=3, columns=5)
    clean = torch.rand(1, 16, 6, 10) * 2 - 1
    noise = torch.randn(1, 16, 6, 10)
    factors, bias = torch.randn(16, 3) / 16, torch.tensor([0.1, -0.2, 0.0])
    img = sampling.pack((1 - sigma) * clean + sigma * noise)
    velocity = sampling.pack(noise - clean)
    colours = LatentColours(factors, bias)
    picture = colours.picture(img, velocity, torch.tensor(sigma), grid)
    expected = np.einsum("chw,cx->hwx", clean[0].numpy(), factors.numpy()) + bias.numpy()
    levels = np.clip(expected / 2 + 0.5, 0, 1) * 255
    assert picture.size == (10, 6)
    assert np.abs(np.asarray(picture).astype(float) - levels).max() <= 1


def test_a_preview_is_small_and_of_numbers_that_are_not_finite_it_is_grey() -> None:
    grid = Grid(rows=150, columns=160)
    img = torch.full((1, grid.tokens, 64), float("nan"))
    colours = LatentColours(torch.zeros(16, 3), torch.zeros(3))
    picture = colours.picture(img, img, torch.tensor(0.5), grid)
    assert max(picture.size) == 256
    assert picture.getpixel((0, 0)) == (128, 128, 128)


def test_flux_has_the_published_map_and_others_none(tmp_path) -> None:
    colours = latent_colours(tmp_path, FLUX, CPU)
    assert colours is not None and colours.factors.shape == (16, 3)
    # ComfyUI's latent_formats.Flux, first and last channel
    assert colours.factors[0].tolist() == pytest.approx([-0.0346, 0.0244, 0.0681])
    assert colours.factors[15].tolist() == pytest.approx([-0.1262, -0.0982, -0.0778])
    assert colours.bias.tolist() == pytest.approx([-0.0329, -0.0718, -0.0851])
    for other in ({"latent_channels": 4}, {"scaling_factor": 1.5305}, {"block_out_channels": [8]}):
        assert latent_colours(tmp_path, {**FLUX, **other}, CPU) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"factors": [[1, 2, 3]], "bias": [0, 0, 0]}',
     '{"factors": "x", "bias": [0, 0, 0]}', json.dumps({"factors": [[0] * 3] * 16, "bias": [0]})],
)  # fmt: skip
def test_a_damaged_map_says_which_file_it_is(tmp_path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(WeightsError, match=FILE):
        latent_colours(tmp_path, FLUX, CPU)


@pytest.fixture(scope="module")
def mini():
    return load_pipeline(model="mini", device="cpu")


def sample() -> Image.Image:
    from redux_server import __file__ as package

    with Image.open(f"{package.removesuffix('__init__.py')}static/sample-icon.png") as icon:
        return icon.convert("RGB")


def test_last_preview_of_mini_looks_like_its_image_and_changes_nothing(mini) -> None:
    request = GenerationRequest(sample(), width=512, height=512, seed=1, num_inference_steps=6)
    previews = []
    for event in mini.generate(request):
        if isinstance(event, Progress):
            assert event.preview is not None
            previews.append(event.preview())
        else:
            image = event.images[0]
    assert [each.index for each in previews] == [0] * 6
    small = np.asarray(image.reduce(32)).astype(float)
    distances = [np.abs(np.asarray(each.image).astype(float) - small).mean() for each in previews]
    assert previews[-1].image.size == (16, 16)
    assert distances[-1] < 20, "grey levels of 255"
    assert distances[-1] < distances[0]
    *_, without = mini.generate(request)
    assert isinstance(without, Result) and without.images[0].tobytes() == image.tobytes()


def test_previews_of_several_requests_are_each_of_their_own_image() -> None:
    pipeline = load_pipeline(model="mini", device="cpu", max_batch_size=3)
    asked = [
        GenerationRequest(Image.new("RGB", (64, 64), colour), width=512, height=512,
                          num_inference_steps=4, num_images=count)
        for colour, count in (("red", 2), ("blue", 1))
    ]  # fmt: skip
    last = {}
    for index, event in pipeline.generate_batch(asked):
        if isinstance(event, Progress):
            last[index] = (
                event.preview().image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
            )
    assert last[0][0] > last[0][2] + 40, "red"
    assert last[1][2] > last[1][0] + 40, "blue"


def test_the_map_of_mini_says_how_it_was_fitted() -> None:
    told = json.loads((find_mini().base / "vae" / FILE).read_text())
    assert "make fit-preview" in told["fitted"]
