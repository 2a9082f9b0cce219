"""Which requests are refused, and that the text says what was given and what is allowed."""

import math
import re

import pytest
from PIL import Image

from redux_pipelines.contract.validation import check_request
from redux_pipelines.errors import RequestError

PICTURE = Image.new("RGB", (9, 9), "teal")


def named(fields):
    """A name for a test that is the same in every process: a picture's holds its address."""
    return re.sub(r"<PIL[^>]*>", "picture", str(fields))


REFUSED = [
    ({"width": 255}, r"width is 255: .* 256 to 1536"),
    ({"height": 1537}, r"height is 1537: .* 256 to 1536"),
    ({"width": 512.0}, r"width is 512.0: .* integer"),
    ({"height": "512"}, r"height is '512': .* integer"),
    ({"num_inference_steps": 0}, r"num_inference_steps is 0: .* 1 to 50"),
    ({"num_inference_steps": 51}, r"num_inference_steps is 51: .* 1 to 50"),
    ({"num_images": 5}, r"num_images is 5: .* 1 to 4"),
    ({"num_images": True}, r"num_images is True: .* integer"),
    ({"seed": -1}, r"seed is -1: .* integer from 0"),
    ({"seed": 2**63}, r"seed is 9223372036854775808: .* integer from 0"),
    ({"guidance_scale": 0.9}, r"guidance_scale is 0.9: .* from 1 to 20"),
    ({"guidance_scale": 20.5}, r"guidance_scale is 20.5: .* from 1 to 20"),
    ({"guidance_scale": math.nan}, r"guidance_scale is nan"),
    ({"guidance_scale": None}, r"guidance_scale is a NoneType"),
    ({"prompt": None}, r"prompt is a NoneType: .* string"),
    ({"image": b"PNG"}, r"image is a bytes: .* PIL image"),
    ({"empty_prompt": "none"}, r"empty_prompt is 'none': .* one of 'zeros', 'encode'"),
    ({"quality": "best"}, r"quality is 'best': .* one of 'exact', 'balanced', 'fast'"),
    ({"quality": 1}, r"quality is 1: .* one of 'exact'"),
    ({"quality": ["fast"]}, r"quality is a list: .* one of 'exact'"),
    ({"fit": "crop"}, r"fit is 'crop': .* one of 'squash', 'letterbox', 'center'"),
    ({"redux_strength": -0.1}, r"redux_strength is -0.1: .* from 0 to 10"),
    ({"redux_strength": math.nan}, r"redux_strength is nan"),
    ({"redux_pooling": 0}, r"redux_pooling is 0: .* 1 to 27"),
    ({"redux_pooling": 28}, r"redux_pooling is 28: .* 1 to 27"),
    ({"images": (PICTURE,) * 4}, r"image and images are 5 pictures: .* at most 4"),
    ({"images": (b"PNG",)}, r"images hold a bytes: .* PIL images"),
    ({"image_weights": (1.0, 2.0)}, r"image_weights are 2 numbers for 1 picture"),
    ({"image_weights": (11.0,)}, r"image_weights is 11.0: .* from 0 to 10"),
    ({"mask": b"PNG"}, r"mask is a bytes: .* PIL image or None"),
]


@pytest.mark.parametrize(("fields", "text"), REFUSED, ids=[named(fields) for fields, _ in REFUSED])
def test_a_request_out_of_range_is_refused(fields, text, request_for):
    with pytest.raises(RequestError, match=text):
        check_request(request_for(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"width": 1536, "height": 512, "num_inference_steps": 50, "num_images": 4},
        {"seed": 9999999999, "guidance_scale": 20, "empty_prompt": "encode"},
        {"quality": None},
        {"quality": "exact"},
        {"quality": "balanced"},
        {"quality": "fast"},
        {"images": (PICTURE,) * 3, "image_weights": (1, 0.5, 0, 10), "redux_strength": 0},
        {"redux_pooling": 1, "fit": "center", "mask": PICTURE},
    ],
    ids=named,
)
def test_a_request_in_range_passes(fields, request_for):
    check_request(request_for(**fields))
