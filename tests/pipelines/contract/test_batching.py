"""Which requests may share a batch."""

from dataclasses import replace

import pytest
from PIL import Image

from redux_pipelines.contract.batching import batch_key, check_together, weights_of
from redux_pipelines.errors import RequestError

ALIKE = {
    "a picture": {"image": Image.new("RGB", (9, 9), "teal")},
    "a seed": {"seed": 5},
    "guidance": {"guidance_scale": 9.0},
    "more images": {"num_images": 3},
    "fit": {"fit": "center"},
    "a weight written out": {"image_weights": (1.0,)},
}
APART = {
    "width": {"width": 528},
    "height": {"height": 528},
    "num_inference_steps": {"num_inference_steps": 3},
    "quality": {"quality": "fast"},
    "has_text": {"prompt": "a fox"},
    "weights": {"redux_strength": 0.5},
    "redux_pooling": {"redux_pooling": 9},
}


@pytest.mark.parametrize("change", ALIKE.values(), ids=ALIKE)
def test_what_may_differ_within_a_batch(change, request_for):
    request = request_for()
    check_together([request, replace(request, **change)])
    assert batch_key(request) == batch_key(replace(request, **change))


@pytest.mark.parametrize("name", APART)
def test_what_may_not_differ_is_named(name, request_for):
    request = request_for()
    other = replace(request, **APART[name])
    assert batch_key(request) != batch_key(other)
    with pytest.raises(RequestError, match=rf"requests 0 and 2 .* {name} is .* and .* same within"):
        check_together([request, request, other])


def test_an_empty_prompt_that_is_encoded_goes_with_prompts(request_for):
    check_together([request_for(empty_prompt="encode"), request_for(prompt="a fox")])
    with pytest.raises(RequestError, match="has_text is False and True"):
        check_together([request_for(), request_for(empty_prompt="encode")])


@pytest.mark.parametrize("change", [{"mask": Image.new("L", (9, 9))}, {"fit": "letterbox"}])
def test_what_the_picture_decides_is_denoised_alone(change, request_for):
    request = request_for(**change)
    check_together([request])
    for others in ([request, request], [request_for(), request]):
        with pytest.raises(RequestError, match="cannot be denoised together with others"):
            check_together(others)


def test_weights_are_those_of_the_pictures_times_the_strength(request_for):
    two = request_for(images=(Image.new("RGB", (9, 9)),), redux_strength=2)
    assert weights_of(two) == (2.0, 2.0)
    assert weights_of(replace(two, image_weights=(0.25, 0.0))) == (0.5, 0.0)
    assert batch_key(two) != batch_key(replace(two, images=()))


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(RequestError, match="at least one"):
        check_together([])
