"""What becomes of each request of a batch."""

import pytest
from PIL import Image

from redux_pipelines.contract.types import Progress, Result
from redux_pipelines.errors import OutputError
from redux_pipelines.jobs import Job, Row, images_per_request, only, rows_of


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
