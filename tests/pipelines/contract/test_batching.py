"""Which requests may share a batch, and what becomes of each."""

from dataclasses import replace

import pytest
from PIL import Image

from redux_pipelines.contract.batching import batch_key, check_together, weights_of
from redux_pipelines.contract.types import Progress, Result
from redux_pipelines.errors import OutputError, RequestError
from redux_pipelines.jobs import Job, Row, images_per_request, only, rows_of

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


def test_rows_are_the_images_of_requests_in_their_order(request_for):
    rows = rows_of([request_for(seed=7, num_images=2), request_for(seed=1), request_for(seed=3)])
    assert rows == [Row(0, 7), Row(0, 8), Row(1, 1), Row(2, 3)]
    assert images_per_request(rows[1:]) == {0: 1, 1: 1, 2: 1}
    assert images_per_request(rows[:2]) == {0: 2}


def test_progress_never_goes_back(request_for):
    job = Job(request_for(num_images=3, num_inference_steps=4), "exact")
    told = [job.progress(step, 2).step for step in (1, 2)]
    told += [job.progress(step, 1).step for step in (1, 2, 3, 4)]  # tried again, one at a time
    job.take(Image.new("RGB", (512, 512)), reused=0)
    told += [job.progress(step, 1).step for step in (1, 2)]
    assert told == [2, 4, 4, 4, 4, 4, 5, 6]
    assert job.progress(1, 1) == Progress(6, 12)


def test_a_job_is_settled_by_its_last_image(request_for):
    job = Job(request_for(num_images=2, num_inference_steps=4, seed=5), "fast")
    job.spend("denoise_s", 1.5)
    job.spend("denoise_s", 1.0)
    job.take(Image.new("RGB", (520, 512)), reused=3)
    assert not job.is_settled
    job.take(Image.new("RGB", (512, 512)), reused=1)
    assert job.is_settled
    result = job.end()
    assert isinstance(result, Result)
    assert [image.size for image in result.images] == [(512, 512)] * 2
    assert (result.seeds, result.quality, result.timings) == ((5, 6), "fast", {"denoise_s": 2.5})
    assert (result.computed_steps, result.reused_steps) == (4, 4)


def test_a_job_is_settled_by_a_spoiled_image(request_for):
    job, error = Job(request_for(num_images=2), "exact"), OutputError("not finite")
    job.take(error, reused=0)
    assert job.is_settled
    assert job.end() is error


def test_the_error_of_the_only_request_is_raised():
    events = only(iter([(0, Progress(1, 2)), (0, OutputError("not finite"))]))
    assert next(events) == Progress(1, 2)
    with pytest.raises(OutputError, match="not finite"):
        next(events)
