"""What counts of a request's pictures, against tokens written out and diffusers as the oracle."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from pipelines import networks
from redux_pipelines.conditioning.redux_tokens import pool, redux_tokens
from redux_pipelines.conditioning.tokens import Tokens, fold_tokens
from redux_pipelines.errors import RequestError

GRID = networks.small_grid()
OTHER = Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 40).convert("RGB")
WHITE, BLACK = Image.new("L", (30, 20), 255), Image.new("L", (30, 20), 0)


@pytest.fixture(scope="module")
def model():
    """A network in float64; diffusers' rotates in float32 all the same."""
    return networks.diffusers_model(torch.float64)


@pytest.fixture(scope="module")
def encoder(pipeline):
    """Of 4 × 4 tokens."""
    return pipeline._components.image_encoder


@pytest.fixture
def tokens(encoder, request_for):
    """Sets of tokens for requests, made double: what is computed with them is exact."""

    def make(**fields):
        sets = redux_tokens(encoder, request_for(**fields))
        return tuple(replace(each, values=each.values[:, :24].double()) for each in sets)

    return make


@torch.inference_mode()
def velocity(denoiser, model, sets):
    given = replace(networks.conditioning(model), redux=tuple(sets))
    return networks.predict(denoiser, given, GRID, networks.noise(model, GRID))


@pytest.fixture(scope="module")
def engine(model):
    return networks.engine(model)


@pytest.fixture(scope="module")
def oracle(model):
    return networks.DiffusersDenoiser(model)


def written_out(values, counts):
    """Row i of ``values`` as ``counts[i]`` rows: what diffusers understands without a bias."""
    return Tokens(values.repeat_interleave(torch.tensor(counts), dim=0))


# --- strength and weights -------------------------------------------------------------------------


def test_strength_0_is_no_token_at_all(tokens):
    assert tokens(redux_strength=0) == ()
    assert tokens(image_weights=(0.0,)) == ()


def test_strength_1_is_bitwise_none(tokens):
    (plain,), (one,) = tokens(), tokens(redux_strength=1, image_weights=(1,))
    assert one.log_weight == plain.log_weight == 0.0
    assert torch.equal(one.values, plain.values)


def test_twice_the_picture_is_strength_2_and_weights_1_and_1(
    tokens, picture, engine, oracle, model
):
    (plain,) = tokens()
    expected = velocity(oracle, model, [Tokens(plain.values.repeat(2, 1))])
    same = [
        tokens(redux_strength=2),
        tokens(images=(picture,)),
        tokens(images=(picture,), image_weights=(1, 1)),
        tokens(images=(picture,), image_weights=(0.5, 1.5)),
        tokens(images=(picture, OTHER), image_weights=(2, 0, 0)),
    ]
    for denoiser, bound in ((engine, 1e-6), (oracle, 1e-12)):
        for sets in same:
            assert networks.error(velocity(denoiser, model, sets), expected) <= bound
    assert networks.error(velocity(engine, model, tokens()), expected) > 1e-3


def test_order_of_pictures_does_not_matter(tokens, picture, engine, model):
    one = tokens(images=(OTHER,), image_weights=(0.3, 2))
    two = tokens(image=OTHER, images=(picture,), image_weights=(2, 0.3))
    assert networks.error(velocity(engine, model, one), velocity(engine, model, two)) <= 1e-12
    swapped = tokens(image=OTHER, images=(picture,), image_weights=(0.3, 2))
    assert networks.error(velocity(engine, model, one), velocity(engine, model, swapped)) > 1e-3


def test_a_strength_between_is_a_bias_on_the_keys_of_the_pictures(tokens):
    (half,) = tokens(redux_strength=0.5)
    assert half.log_weight == math.log(0.5)


# --- pooling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [4, 5, 27])
def test_pooling_to_the_grid_or_more_is_bitwise_none(side, tokens):
    (plain,), (pooled,) = tokens(), tokens(redux_pooling=side)
    assert pooled.log_weight == 0.0
    assert torch.equal(pooled.values, plain.values)


@pytest.mark.parametrize("grid", [(6, 6), (8, 8), (27, 27), (4, 6)], ids=str)
@pytest.mark.parametrize("side", [1, 2, 3, 5, 20])
def test_areas_are_equal_and_their_masses_make_up_the_picture(side, grid):
    count = grid[0] * grid[1]
    values = torch.randn(count, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    ((means, mass),) = pool(values, grid, side)
    assert len(means) * mass == pytest.approx(count, rel=1e-12)
    assert torch.allclose(means.mean(0), values.mean(0), atol=1e-12)
    places = values.view(*grid, 3).permute(2, 0, 1)
    fine = places.repeat_interleave(side, 1).repeat_interleave(side, 2)  # no area cuts these
    areas = torch.nn.functional.adaptive_avg_pool2d(fine, [min(side, each) for each in grid])
    assert torch.allclose(means, areas.flatten(1).T, atol=1e-12)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_pooling_equal_tokens_is_exact(side, engine, oracle, model):
    token = torch.randn(1, 24, dtype=torch.float64, generator=torch.manual_seed(0))
    ((means, mass),) = pool(token.expand(16, -1), (4, 4), side)
    pooled = [Tokens(means, log_weight=math.log(mass))]
    expected = velocity(oracle, model, [Tokens(token.repeat(16, 1))])
    assert networks.error(velocity(engine, model, pooled), expected) <= 1e-6
    assert networks.error(velocity(oracle, model, pooled), expected) <= 1e-12
    without_mass = [Tokens(means)]
    assert networks.error(velocity(engine, model, without_mass), expected) > 1e-3


def test_pooled_tokens_count_as_many_as_they_replace(tokens, engine, oracle, model):
    (pooled,) = tokens(redux_pooling=2)
    assert pooled.log_weight == math.log(4)
    expected = velocity(oracle, model, [written_out(pooled.values, [4] * 4)])
    assert networks.error(velocity(engine, model, [pooled]), expected) <= 1e-6


# --- masks and fit --------------------------------------------------------------------------------


def left_half(size=(64, 40)):
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((0, 0, size[0] // 2 - 1, size[1]), 255)
    return mask


@pytest.mark.parametrize("fit", ["squash", "center"])
@pytest.mark.parametrize("pooling", [2, 27])
def test_a_white_mask_is_bitwise_none(fit, pooling, tokens):
    (plain,) = tokens(fit=fit, redux_pooling=pooling)
    (masked,) = tokens(fit=fit, redux_pooling=pooling, mask=WHITE)
    assert masked.log_weight == plain.log_weight
    assert torch.equal(masked.values, plain.values)


def test_a_mask_leaves_out_the_tokens_of_its_black_part(tokens):
    (plain,), (masked,) = tokens(), tokens(mask=left_half())
    columns = plain.values.view(4, 4, -1)[:, :2]
    assert torch.equal(masked.values, columns.flatten(0, 1))


def test_a_mask_is_of_the_first_picture_alone(tokens):
    _, (other,) = tokens(), tokens(image=OTHER)
    masked = tokens(images=(OTHER,), mask=left_half())
    assert len(masked[0].values) == 8
    assert torch.equal(masked[1].values, other.values)


def test_a_token_counts_from_half_of_its_square_on(tokens):
    def columns(width):  # of 64 pixels, 16 a token
        mask = Image.new("L", (64, 64), 0)
        ImageDraw.Draw(mask).rectangle((0, 0, width - 1, 64), 255)
        return len(tokens(mask=mask)[0].values) // 4

    assert [columns(width) for width in (8, 23, 24, 32, 64)] == [1, 1, 2, 2, 4]


def test_a_black_mask_is_refused_with_what_to_do(tokens):
    with pytest.raises(RequestError, match=r"nothing of image.*4 × 4.*half or more.*larger"):
        tokens(mask=BLACK)


SLIVERS = [(2000, 60), (60, 2000), (1000, 100), (3000, 16)]


@pytest.mark.parametrize("size", SLIVERS, ids=str)
def test_a_sliver_in_a_letterbox_blames_no_mask_that_nobody_sent(tokens, request_for, size):
    sliver = Image.new("RGB", size, "red")
    for fields in ({"image": sliver}, {"image": sliver, "mask": WHITE}, {"images": (sliver,)}):
        name = r"images\[0\]" if "images" in fields else "image"
        with pytest.raises(RequestError, match=rf"^{name} is too narrow for fit letterbox") as told:
            tokens(fit="letterbox", **fields)
        assert "mask" not in str(told.value)
        for fit in ("squash", "center"):
            assert tokens(fit=fit, **{**fields, "mask": None})


def test_a_black_mask_in_a_letterbox_is_the_masks_fault(tokens):
    with pytest.raises(RequestError, match="the mask leaves nothing of image"):
        tokens(fit="letterbox", mask=BLACK)


def test_masked_areas_average_what_counts_and_weigh_what_they_replace(
    tokens, engine, oracle, model
):
    mask = Image.new("L", (4, 4), 0)
    mask.putdata([255 * (index in (0, 1, 4, 5, 2, 8, 12)) for index in range(16)])
    (plain,) = tokens()
    sets = tokens(mask=mask, redux_pooling=2)
    assert [(len(each.values), round(math.exp(each.log_weight))) for each in sets] == [
        (1, 1), (1, 2), (1, 4),
    ]  # fmt: skip
    corner = plain.values[[0, 1, 4, 5]].mean(0)
    assert torch.allclose(sets[2].values[0], corner, rtol=1e-5)
    assert torch.allclose(sets[0].values[0], plain.values[2], rtol=1e-5)
    expanded = [written_out(each.values, [n]) for each, n in zip(sets, (1, 2, 4), strict=True)]
    expected = velocity(oracle, model, expanded)
    assert networks.error(velocity(engine, model, sets), expected) <= 1e-6


def test_fits_of_a_square_picture_are_one(encoder, picture):
    square = picture.resize((90, 90))
    squash, *others = (encoder.encode(square, fit) for fit in ("squash", "letterbox", "center"))
    assert all(torch.equal(squash, other) for other in others)


def test_letterbox_keeps_the_whole_and_leaves_its_bars_out(tokens, encoder, picture):
    wide = picture.resize((160, 80))
    (boxed,) = tokens(image=wide, fit="letterbox")
    paper = Image.new("RGB", (64, 64), "white")
    paper.paste(wide.resize((64, 32), Image.Resampling.BICUBIC), (0, 16))
    middle = encoder.encode(paper).view(4, 4, -1)[1:3]
    assert torch.equal(boxed.values, middle.flatten(0, 1)[:, :24].double())


def test_center_cuts_out_the_middle_of_picture_and_mask(tokens):
    wide = OTHER.resize((160, 80))
    (cut,) = tokens(image=wide, fit="center")
    (expected,) = tokens(image=wide.crop((40, 0, 120, 80)))
    assert torch.equal(cut.values, expected.values)
    (masked,) = tokens(image=wide, fit="center", mask=left_half())
    assert torch.equal(masked.values, cut.values.view(4, 4, -1)[:, :2].flatten(0, 1))


def test_a_mask_goes_with_a_picture_that_its_file_turns(tokens, encoder):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees: 40 wide, 80 high
    turned = OTHER.resize((80, 40))
    turned.info["exif"] = exif.tobytes()
    turned._exif = exif
    (boxed,) = tokens(image=turned, fit="letterbox")
    assert len(boxed.values) == 8


# --- the whole way --------------------------------------------------------------------------------

ALL_AT_ONCE = {
    "images": (OTHER,),
    "image_weights": (0.7, 1.5),
    "redux_strength": 1.2,
    "redux_pooling": 3,
    "fit": "letterbox",
    "mask": left_half(),
}


@pytest.mark.parametrize("prompt", ["", "a fox"])
def test_both_backends_make_the_same_picture_of_all_controls(
    prompt, tiny, load, request_for, finish, difference
):
    request = request_for(prompt=prompt, **ALL_AT_ONCE)
    made = [
        finish(load(tiny, backend=name).generate(request)).images[0]
        for name in ("engine", "diffusers")
    ]
    assert difference(*made) <= 1
    assert (
        difference(made[0], finish(load(tiny).generate(request_for(prompt=prompt))).images[0]) > 9
    )


def test_requests_without_controls_are_the_bits_they_were(pipeline, request_for, finish, picture):
    plain = finish(pipeline.generate(request_for())).images[0]
    explicit = {"image_weights": (1.0,), "redux_strength": 1.0, "redux_pooling": 27, "mask": WHITE}
    same = finish(pipeline.generate(request_for(**explicit))).images[0]
    assert np.array_equal(np.asarray(plain), np.asarray(same))


@pytest.mark.parametrize("backend", ["engine", "diffusers"])
def test_steered_requests_of_one_key_share_a_batch(
    backend, tiny, load, request_for, finish, difference
):
    pipeline = load(tiny, backend=backend, max_batch_size=2)
    steered = {"image_weights": (0.5, 1.0), "redux_pooling": 2}
    requests = [
        request_for(images=(OTHER,), seed=1, **steered),
        request_for(image=OTHER, images=(OTHER,), seed=2, fit="center", **steered),
    ]
    together = {place: event for place, event in pipeline.generate_batch(requests)}
    for place, request in enumerate(requests):
        alone = finish(pipeline.generate(request)).images[0]
        assert difference(together[place].images[0], alone) <= 1


def test_a_compiler_never_sees_a_text_of_one_row(model):
    given = replace(networks.conditioning(model, copies=9), redux=())
    rows = fold_tokens(given, img_rows=24)
    assert len(rows.values) == 2
    assert rows.groups[0].bias == -math.inf
    img = networks.noise(model, GRID)
    ours = networks.predict(networks.engine(model), given, GRID, img)
    assert networks.error(ours, networks.oracle(model, given, GRID, img)) <= 1e-6


# --- preprocessed pictures ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask", [None, ImageOps.pad(WHITE, (90, 70), color=0)], ids=["whole", "masked"]
)
@pytest.mark.parametrize("fit", ["squash", "letterbox", "center"])
@pytest.mark.parametrize("images", [(), (OTHER, OTHER.rotate(90, expand=True))], ids=["1", "3"])
def test_preprocessed_pictures_give_bitwise_the_same_tokens(
    pipeline, encoder, request_for, fit, mask, images
):
    request = request_for(image=OTHER.resize((300, 200)), images=images, fit=fit, mask=mask)
    ready, sets = pipeline.preprocess(request), []
    assert ready.fit == fit
    assert (ready.mask is None) == (mask is None)
    for each in ready.pictures:
        assert each.pixels.size == (64, 64)
        assert each.coverage is None or each.coverage.size == (4, 4)
    for each in (request, ready):
        encoder.cache.clear()
        sets.append(redux_tokens(encoder, each))
    assert [each.log_weight for each in sets[0]] == [each.log_weight for each in sets[1]]
    assert all(torch.equal(a.values, b.values) for a, b in zip(*sets, strict=True))
    assert pipeline.preprocess(ready) == ready, "once is enough"


def test_what_a_preprocessed_mask_leaves_nothing_of_is_refused(pipeline, encoder, request_for):
    ready = pipeline.preprocess(request_for(mask=BLACK))
    with pytest.raises(RequestError):
        redux_tokens(encoder, ready)


def test_a_request_that_cannot_be_served_is_not_preprocessed(pipeline, request_for):
    with pytest.raises(RequestError, match="fit is 'wide'"):
        pipeline.preprocess(request_for(fit="wide"))
