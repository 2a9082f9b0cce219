"""The fake keeps the contract of the real pipeline."""

import time
from types import SimpleNamespace

import pytest
from PIL import Image

from redux_pipelines import fake
from redux_pipelines.contract.types import Progress
from redux_pipelines.errors import RequestError
from redux_pipelines.fake import FakePipeline


def test_the_result_has_the_size_and_seeds_asked_for(request_for):
    request = request_for(width=520, height=999, num_images=2, seed=4, num_inference_steps=3)
    *steps, result = FakePipeline().generate(request)
    assert steps == [Progress(step, 6) for step in range(1, 7)]
    assert [image.size for image in result.images] == [(520, 999)] * 2
    assert result.seeds == (4, 5)
    assert set(result.timings) == {"encode_s", "denoise_s", "decode_s"}
    assert (result.quality, result.computed_steps, result.reused_steps) == ("exact", 6, 0)


def test_a_tier_is_reported(request_for, finish):
    pipeline = FakePipeline(quality="fast")
    assert finish(pipeline.generate(request_for())).quality == "fast"
    assert finish(pipeline.generate(request_for(quality="balanced"))).quality == "balanced"


def test_the_colour_depends_on_seed_prompt_and_picture_alone(request_for, finish):
    def colour(**fields):
        return finish(FakePipeline().generate(request_for(**fields))).images[0].getpixel((0, 0))

    assert colour() == colour(num_inference_steps=9)
    changes = ({}, {"seed": 1}, {"prompt": "fox"}, {"image": Image.new("RGB", (9, 9), "teal")})
    assert len({colour(**fields) for fields in changes}) == 4


def test_image_i_is_the_single_image_with_seed_plus_i(request_for, finish, difference):
    pair = finish(FakePipeline().generate(request_for(seed=3, num_images=2)))
    single = finish(FakePipeline().generate(request_for(seed=4)))
    assert difference(pair.images[1], single.images[0]) == 0


def test_it_refuses_what_the_real_one_refuses(request_for):
    with pytest.raises(RequestError, match="width"):
        FakePipeline().generate(request_for(width=1))


def test_it_fails_on_demand_after_a_step(request_for):
    events = FakePipeline(fail_on="boom").generate(request_for(prompt="go boom"))
    assert next(events) == Progress(1, 2)
    with pytest.raises(RuntimeError, match="boom"):
        next(events)


def test_steps_take_the_time_asked_for(request_for, finish):
    result = finish(FakePipeline(step_s=0.02).generate(request_for()))
    assert result.timings["denoise_s"] >= 0.04


def test_requests_together_are_those_alone_in_fewer_rounds(request_for, finish, difference):
    requests = [request_for(seed=3), request_for(seed=8, num_images=2), request_for(seed=1)]
    told, results = [], {}
    for place, event in FakePipeline(max_batch_size=3).generate_batch(requests):
        if isinstance(event, Progress):
            told.append((place, event.step, event.total_steps))
        else:
            results[place] = event
    first = [(0, 1, 2), (1, 2, 4), (0, 2, 2), (1, 4, 4)]  # three images in two rounds
    assert told == [*first, (2, 1, 2), (2, 2, 2)]
    for place, request in enumerate(requests):
        alone = finish(FakePipeline().generate(request))
        assert results[place].seeds == alone.seeds
        assert list(map(difference, results[place].images, alone.images)) == [0] * len(alone.images)


def test_images_of_a_batch_share_the_time_of_a_step(request_for, finish, monkeypatch):
    slept = []
    clock = SimpleNamespace(sleep=slept.append, perf_counter=time.perf_counter)
    monkeypatch.setattr(fake, "time", clock)
    finish(FakePipeline(step_s=7.5, max_batch_size=3).generate(request_for(num_images=4)))
    assert slept == [7.5] * 4  # two rounds of two steps
