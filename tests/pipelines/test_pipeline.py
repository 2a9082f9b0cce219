"""Parity with diffusers' pipelines, and what the generator promises its caller."""

import gc
import weakref
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.fake_graphs import FakeCapture
from pipelines.pretended_gpus import PretendedGpus
from redux_pipelines import pipeline as pipeline_module
from redux_pipelines.compilation.cuda_graphs import GraphedStep
from redux_pipelines.contract.types import CompilePlan, Progress, Result
from redux_pipelines.denoising.quality import TIERS, CachePolicy, Tier
from redux_pipelines.errors import DeviceError, DeviceMemoryError, OutputError, RequestError
from redux_pipelines.fake import FakePipeline
from redux_pipelines.memory.plan import GraphLimits
from redux_pipelines.pipeline import ReduxPipeline
from redux_pipelines.sampling import Grid

PICTURES = (Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue"))


class Oracle:
    """FluxPriorReduxPipeline + FluxPipeline, given embeddings of this model's sizes.

    The prior hard-codes 512 × 4096 zeros, and FluxPipeline its default size; neither is used.
    """

    def __init__(self, checkpoint):
        from diffusers import FluxPipeline, FluxPriorReduxPipeline

        self.base = FluxPipeline.from_pretrained(checkpoint.base)
        self.base.set_progress_bar_config(disable=True)
        self.prior = FluxPriorReduxPipeline.from_pretrained(
            checkpoint.redux,
            text_encoder=self.base.text_encoder,
            tokenizer=self.base.tokenizer,
            text_encoder_2=self.base.text_encoder_2,
            tokenizer_2=self.base.tokenizer_2,
        )

    def text(self, prompt):
        length = self.base.tokenizer_2.model_max_length
        if prompt is None:
            config = self.base.transformer.config
            zeros = torch.zeros(1, length, config.joint_attention_dim)
            return zeros, torch.zeros(1, config.pooled_projection_dim)
        with torch.no_grad():
            txt, vec, _ = self.base.encode_prompt(prompt, prompt, max_sequence_length=length)
        return txt, vec

    def images(self, request, *, encode_empty=False):
        txt, vec = self.text(request.prompt if request.prompt or encode_empty else None)
        prior = self.prior(request.image, prompt_embeds=txt, pooled_prompt_embeds=vec)
        multiple = 2 * self.base.vae_scale_factor
        return [
            self.base(
                prompt_embeds=prior.prompt_embeds,
                pooled_prompt_embeds=prior.pooled_prompt_embeds,
                height=-(-request.height // multiple) * multiple,
                width=-(-request.width // multiple) * multiple,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                generator=torch.Generator().manual_seed(request.seed + index),
            ).images[0]
            for index in range(request.num_images)
        ]


@pytest.fixture(scope="module")
def oracle(tiny):
    return Oracle(tiny)


PARITY = {
    "no prompt": {},
    "a prompt": {"prompt": "a red fox in the snow"},
    "an encoded empty prompt": {"empty_prompt": "encode"},
    "three images": {"num_images": 3, "seed": 7},
    "landscape": {"width": 768, "height": 512, "num_inference_steps": 4},
    "portrait": {"width": 512, "height": 1024},
    "one step": {"num_inference_steps": 1},
    "guidance 1": {"guidance_scale": 1.0},
    "guidance 20": {"guidance_scale": 20.0},
}


@pytest.fixture(scope="module")
def backends(tiny, load):
    return {name: load(tiny, backend=name) for name in ("engine", "diffusers")}


@pytest.mark.parametrize("fields", PARITY.values(), ids=PARITY)
def test_images_are_those_of_diffusers(fields, backends, oracle, request_for, finish, difference):
    request = request_for(**fields)
    theirs = oracle.images(request, encode_empty=request.empty_prompt == "encode")
    for name, backend in backends.items():
        ours = finish(backend.generate(request)).images
        assert len(ours) == len(theirs) == request.num_images
        assert max(map(difference, ours, theirs)) <= 1, name


@pytest.mark.parametrize("kind", ["tiny_schnell", "tiny_f8"])
def test_other_kinds_of_model_match_diffusers_too(
    kind, request, load, request_for, finish, difference
):
    checkpoint = request.getfixturevalue(kind)
    wanted = request_for(prompt="a red fox")
    theirs = Oracle(checkpoint).images(wanted)[0]
    for backend in ("engine", "diffusers"):
        ours = finish(load(checkpoint, backend=backend).generate(wanted)).images[0]
        assert difference(ours, theirs) <= 1, backend


def test_batched_images_agree_within_one_grey_level(
    tiny, pipeline, load, request_for, finish, difference
):
    request = request_for(num_images=3)
    alone = finish(pipeline.generate(request))
    events = list(load(tiny, max_batch_size=2).generate(request))
    assert [event.step for event in events[:-1]] == [2, 4, 5, 6]
    assert events[-1].seeds == alone.seeds
    assert max(map(difference, events[-1].images, alone.images)) <= 1


def test_sizes_off_the_grid_are_the_centre_of_the_grid_size(
    pipeline, request_for, finish, difference
):
    small = finish(pipeline.generate(request_for(width=520, height=1000))).images[0]
    large = finish(pipeline.generate(request_for(width=576, height=1024))).images[0]
    assert small.size == (520, 1000)
    assert difference(small, large.crop((28, 12, 548, 1012))) == 0


def test_image_i_is_bitwise_the_single_image_with_seed_plus_i(
    pipeline, request_for, finish, difference
):
    four = finish(pipeline.generate(request_for(num_images=4, seed=10)))
    assert four.seeds == (10, 11, 12, 13)
    for seed, image in zip(four.seeds, four.images, strict=True):
        single = finish(pipeline.generate(request_for(seed=seed))).images[0]
        assert difference(image, single) == 0


def test_the_same_request_gives_bitwise_the_same_image(pipeline, request_for, finish, difference):
    request = request_for(prompt="twice")
    first, second = (finish(pipeline.generate(request)).images[0] for _ in range(2))
    assert difference(first, second) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"prompt": "a red fox"},
        {"empty_prompt": "encode"},
        {"guidance_scale": 5.0},
        {"image": Image.new("RGB", (64, 64), "green")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_input_changes_the_output(change, pipeline, request_for, finish):
    request = request_for()
    images = [
        np.asarray(finish(pipeline.generate(wanted)).images[0]).astype(float)
        for wanted in (request, replace(request, **change))
    ]
    assert np.abs(images[0] - images[1]).mean() > 1.0
    assert images[0].std() > 10


def test_guidance_is_not_given_to_a_model_without_it(
    tiny_schnell, load, request_for, finish, difference
):
    pipeline = load(tiny_schnell)
    low, high = (
        finish(pipeline.generate(request_for(guidance_scale=scale))).images[0] for scale in (1, 20)
    )
    assert difference(low, high) == 0


def test_repeats_are_served_from_caches(tiny, load, request_for, finish, difference):
    pipeline, request = load(tiny), request_for(prompt="again")
    first, second = (finish(pipeline.generate(request)).images[0] for _ in range(2))
    assert difference(first, second) == 0
    stats = pipeline.cache_stats()
    assert set(stats) == {"modulations", "rotations", "prompts", "pictures"}
    assert {(each.hits, each.misses, each.entries) for each in stats.values()} == {(1, 1, 1)}
    finish(pipeline.generate(replace(request, seed=9, num_images=2)))
    assert all(each.misses == 1 for each in pipeline.cache_stats().values())


CHANGES = {
    "a prompt": ({"prompt": "other"}, {"prompts", "modulations"}),
    "a picture": ({"image": Image.new("RGB", (8, 8), "green")}, {"pictures"}),
    "a size": ({"width": 576}, {"rotations", "modulations"}),  # sizes shift the schedule
    "guidance": ({"guidance_scale": 2.0}, {"modulations"}),
    "steps": ({"num_inference_steps": 3}, {"modulations"}),
    "a seed": ({"seed": 5}, set()),
}


@pytest.mark.parametrize(("fields", "missed"), CHANGES.values(), ids=CHANGES)
def test_caches_miss_what_changed(fields, missed, tiny, load, request_for, finish):
    pipeline, request = load(tiny), request_for(prompt="first")
    finish(pipeline.generate(request))
    finish(pipeline.generate(replace(request, **fields)))
    stats = pipeline.cache_stats()
    assert {name for name, each in stats.items() if each.misses == 2} == missed


def test_progress_counts_every_step_of_every_image(pipeline, request_for):
    *steps, result = pipeline.generate(request_for(num_images=2, num_inference_steps=3))
    assert steps == [Progress(step, 6) for step in range(1, 7)]
    assert isinstance(result, Result)
    assert set(result.timings) == {"encode_s", "denoise_s", "decode_s"}
    assert all(seconds > 0 for seconds in result.timings.values())


def test_inference_mode_does_not_leak_to_the_caller(pipeline, request_for):
    for _ in pipeline.generate(request_for()):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


class _Spy:
    """A denoiser that remembers weakly what it handed out."""

    name = "spy"
    attention = "spy"
    qualities = ("exact",)
    caches: ClassVar = {}

    def __init__(self, denoiser):
        self._denoiser = denoiser
        self.tensors = []

    def prepare(self, conditioning, schedule, grid):
        picture = conditioning.redux[0].values
        self.tensors += [weakref.ref(picture), weakref.ref(conditioning.vec)]
        prepared = self._denoiser.prepare(conditioning, schedule, grid)
        return _SpyPrepared(prepared, self.tensors)

    def join(self, prepared):
        (only,) = prepared
        return only


class _SpyPrepared:
    reused = 0

    def __init__(self, prepared, tensors):
        self._prepared = prepared
        self._tensors = tensors

    def start(self, tier):
        assert tier.cache is None
        return self

    def predict(self, img, step):
        velocity = self._prepared.predict(img, step)
        self._tensors += [weakref.ref(img), weakref.ref(velocity)]
        return velocity


def test_closing_midway_frees_everything_at_once(pipeline, request_for):
    spy = _Spy(pipeline._components.denoiser)
    spied = ReduxPipeline(replace(pipeline._components, denoiser=spy), name="spied")
    events = spied.generate(request_for(num_inference_steps=5))
    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        assert next(events) == Progress(1, 5)
        assert next(events) == Progress(2, 5)
        events.close()
        picture, *others = spy.tensors
        assert len(others) == 5
        assert all(tensor() is None for tensor in others)
        assert picture() is not None  # kept for the next request
        pipeline._components.image_encoder.cache.clear()
        assert picture() is None
    finally:
        gc.enable()
    assert list(events) == []


def test_interleaved_generators_do_not_disturb_each_other(
    pipeline, request_for, finish, difference
):
    first, second = request_for(num_inference_steps=3), request_for(seed=5, width=576)
    alone = [finish(pipeline.generate(request)).images[0] for request in (first, second)]
    running = [pipeline.generate(request) for request in (first, second)]
    results = {}
    while len(results) < 2:
        for index, events in enumerate(running):
            event = next(events, None)
            if isinstance(event, Result):
                results[index] = event.images[0]
    assert [difference(results[index], alone[index]) for index in (0, 1)] == [0, 0]


def test_a_bad_request_is_refused_before_the_first_step(pipeline, request_for):
    with pytest.raises(RequestError, match=r"width is 100: .* from 256 to 1536"):
        pipeline.generate(request_for(width=100))


@pytest.fixture
def planned(pipeline):
    """A pipeline whose GPU, which is not there, has room for 1024 × 1024, or 768 × 768 twice.

    Of two pictures or more only for 640 × 640.
    """
    parts = pipeline._components
    plan = replace(parts.plan, mode="resident", largest_sides=((1024, 768), *[(640, 640)] * 3))
    parts = replace(parts, plan=plan, device=torch.device("cuda", 0))
    return ReduxPipeline(parts, name="planned", max_batch_size=2)


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"width": 1024, "height": 1024}, None),
        ({"width": 1536, "height": 640}, None),
        ({"width": 1088, "height": 1024}, "1 image(s) at once of 1088x1024"),
        ({"width": 768, "height": 768, "num_images": 4}, None),
        ({"width": 768, "height": 832, "num_images": 2}, "2 image(s) at once of 768x832"),
        ({"width": 768, "height": 832, "num_images": 4}, "2 image(s) at once of 768x832"),
        ({"width": 640, "height": 640, "images": PICTURES}, None),
        ({"width": 704, "height": 640, "images": PICTURES}, "704x640 from 3 pictures"),
        ({"width": 1024, "height": 1024, "images": PICTURES, "redux_pooling": 1}, None),
        ({"width": 1024, "height": 1024, "images": PICTURES, "image_weights": (1, 0, 0)}, None),
    ],
)
def test_a_request_beyond_the_memory_plan_is_refused_at_once(
    fields, refused, planned, request_for, monkeypatch
):
    def compute(*_):
        raise AssertionError("nothing may be computed")

    monkeypatch.setattr(type(planned._components.denoiser), "prepare", compute)
    monkeypatch.setattr(type(planned._components.image_encoder), "encode", compute)
    if refused is None:
        planned.generate(request_for(**fields)).close()
        return
    with pytest.raises(RequestError) as raised:
        planned.generate(request_for(**fields))
    text = str(raised.value)
    assert refused in text
    assert "run the model with --memory offload" in text
    side = 640 if "images" in fields else 1024 if fields.get("num_images", 1) == 1 else 768
    assert f"room for up to {side}x{side} pixels" in text


def test_a_cpu_has_no_plan_to_keep(pipeline, request_for):
    """Its plan is made for a card without memory; only a GPU's says what fits."""
    parts = replace(
        pipeline._components, plan=replace(pipeline._components.plan, largest_sides=((0,),))
    )
    ReduxPipeline(parts, name="cpu").generate(request_for(width=1536, height=1536)).close()


def test_max_batch_size_must_be_positive(pipeline):
    with pytest.raises(ValueError, match="at least 1"):
        ReduxPipeline(pipeline._components, name="none", max_batch_size=0)


# --- batches of several requests ------------------------------------------------------------------

GREEN = Image.new("RGB", (64, 64), "green")


def run(events):
    """Results by index, and what was told of progress by index."""
    results, steps = {}, {}
    for index, event in events:
        if isinstance(event, Progress):
            assert index not in results
            steps.setdefault(index, []).append(event.step)
        else:
            assert index not in results
            results[index] = event
    return results, steps


@pytest.fixture(scope="module")
def batched(tiny, load):
    return {name: load(tiny, backend=name, max_batch_size=3) for name in ("engine", "diffusers")}


def mixed(request_for, **fields):
    return [
        request_for(seed=1, guidance_scale=1.0, **fields),
        request_for(seed=2, num_images=2, image=GREEN, **fields),
        request_for(seed=9, guidance_scale=8.0, image=GREEN, **fields),
    ]


@pytest.mark.parametrize("prompts", [("", "", ""), ("a fox", "a red hen", "x")], ids=["no", "with"])
@pytest.mark.parametrize("backend", ["engine", "diffusers"])
def test_requests_together_are_those_alone(
    backend, prompts, batched, request_for, finish, difference
):
    pipeline = batched[backend]
    requests = [
        replace(request, prompt=prompt)
        for request, prompt in zip(mixed(request_for), prompts, strict=True)
    ]
    results, steps = run(pipeline.generate_batch(requests))
    assert steps == {0: [1, 2], 1: [1 * 2, 2 * 2], 2: [1, 2]}  # 3 images, then 1
    single = ReduxPipeline(pipeline._components, name="one at a time")
    for index, request in enumerate(requests):
        alone = finish(single.generate(request))
        assert results[index].seeds == alone.seeds
        assert len(results[index].images) == request.num_images
        assert max(map(difference, results[index].images, alone.images)) <= 1
        assert set(results[index].timings) == {"encode_s", "denoise_s", "decode_s"}
        assert (results[index].computed_steps, results[index].reused_steps) == (
            2 * request.num_images,
            0,
        )
    greys = [np.asarray(results[index].images[0]).astype(float) for index in results]
    assert min(np.abs(greys[0] - other).mean() for other in greys[1:]) > 1.0


def test_a_request_is_done_as_soon_as_its_images_are(batched, request_for):
    events = list(batched["engine"].generate_batch(mixed(request_for)))
    told = [(index, type(event).__name__) for index, event in events]
    assert told[-3:] == [(2, "Progress"), (2, "Progress"), (2, "Result")]
    assert [index for index, name in told[:-3] if name == "Result"] == [0, 1]


def test_one_request_through_either_door_is_the_same(batched, request_for, finish, difference):
    request = request_for(num_images=2, prompt="a fox")
    results, _ = run(batched["engine"].generate_batch([request]))
    alone = finish(batched["engine"].generate(request))
    assert list(map(difference, results[0].images, alone.images)) == [0, 0]


def test_a_tier_of_a_batch_is_decided_by_the_batch(
    monkeypatch, batched, request_for, finish, difference
):
    policy = CachePolicy(float("inf"), 1, 2, 1)  # whatever changes: CrrC
    monkeypatch.setattr(pipeline_module, "TIERS", {**TIERS, "fast": Tier(policy)})
    pipeline = batched["engine"]
    requests = mixed(request_for, quality="fast", num_inference_steps=4)[:2]
    results, _ = run(pipeline.generate_batch(requests))
    for index, request in enumerate(requests):
        result, alone = results[index], finish(pipeline.generate(request))
        assert result.quality == "fast"
        assert (result.computed_steps, result.reused_steps) == (
            2 * request.num_images,
            2 * request.num_images,
        )
        assert max(map(difference, result.images, alone.images)) <= 1


def test_the_pipelines_tier_and_the_same_tier_by_name_go_together(batched, request_for):
    results, _ = run(
        batched["engine"].generate_batch([request_for(), request_for(quality="exact", seed=4)])
    )
    assert [result.quality for result in results.values()] == ["exact", "exact"]


@pytest.mark.parametrize("make", [lambda batched: batched["engine"], lambda _: FakePipeline()])
def test_bad_batches_are_refused_before_the_first_step(make, batched, request_for):
    pipeline = make(batched)
    with pytest.raises(RequestError, match="width is 512 and 528"):
        pipeline.generate_batch([request_for(), request_for(width=528)])
    with pytest.raises(RequestError, match="guidance_scale"):
        pipeline.generate_batch([request_for(), request_for(guidance_scale=99)])
    with pytest.raises(RequestError, match="at least one"):
        pipeline.generate_batch([])


class Watched:
    """A denoiser that remembers weakly what passes, and may be told to fail."""

    def __init__(self, denoiser, fail=lambda img, step: None):
        self._denoiser = denoiser
        self._fail = fail
        self.tensors = []
        self.sizes = []

    def __getattr__(self, name):
        return getattr(self._denoiser, name)

    def join(self, prepared):
        return Watching(self._denoiser.join(prepared), self, self._fail)


class Watching:
    def __init__(self, prepared, owner, fail):
        self._prepared, self._owner, self._fail = prepared, owner, fail

    def start(self, tier):
        self._run = self._prepared.start(tier)
        return self

    @property
    def reused(self):
        return self._run.reused

    def predict(self, img, step):
        self._owner.sizes.append((len(img), step))
        velocity = self._run.predict(img, step)
        self._owner.tensors += [weakref.ref(img), weakref.ref(velocity)]
        self._owner.tensors.append(weakref.ref(self._prepared.txt))
        changed = self._fail(img, step)
        return velocity if changed is None else changed(velocity)


def watched(pipeline, fail=lambda img, step: None, max_batch_size=4):
    spy = Watched(pipeline._components.denoiser, fail)
    parts = replace(pipeline._components, denoiser=spy)
    return ReduxPipeline(parts, name="watched", max_batch_size=max_batch_size), spy


def test_closing_a_batch_midway_frees_everything_at_once(pipeline, request_for):
    spied, spy = watched(pipeline)
    requests = [request_for(seed=seed, num_inference_steps=5) for seed in (1, 2)]
    events = spied.generate_batch(requests)
    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        assert [next(events) for _ in range(3)][-1] == (0, Progress(2, 5))
        assert any(tensor() is not None for tensor in spy.tensors)
        events.close()
        assert len(spy.tensors) == 6
        assert all(tensor() is None for tensor in spy.tensors)
    finally:
        gc.enable()


# --- too little memory ----------------------------------------------------------------------------


def no_memory(img, step):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_batch_that_does_not_fit_is_halved(pipeline, request_for, finish, difference):
    def fail(img, step):
        if len(img) > 1 and step == 1:
            no_memory(img, step)

    spied, spy = watched(pipeline, fail)
    requests = [request_for(seed=1, num_images=2), request_for(seed=7), request_for(seed=4)]
    results, steps = run(spied.generate_batch(requests))
    assert spy.sizes == [(4, 0), (4, 1), (2, 0), (2, 1), *[(1, 0), (1, 1)] * 4]
    assert steps[1] == [1, 1, 2]  # nothing is taken back that was told
    for index, request in enumerate(requests):
        alone = finish(pipeline.generate(request))
        assert list(map(difference, results[index].images, alone.images)) == [0] * len(alone.images)


def test_what_a_failed_attempt_held_is_freed_before_the_next(pipeline, request_for):
    alive = []

    def fail(img, step):
        if len(img) > 1:
            no_memory(img, step)
        alive.append(sum(tensor() is not None for tensor in spy.tensors[:3]))

    spied, spy = watched(pipeline, fail, max_batch_size=2)
    gc.collect()
    gc.disable()
    try:
        list(spied.generate_batch([request_for(seed=1), request_for(seed=2)]))
    finally:
        gc.enable()
    assert alive == [0] * 4


@pytest.mark.parametrize("mode", ["resident", "offload"])
def test_a_single_image_that_does_not_fit_says_what_would_help(
    mode, pipeline, request_for, monkeypatch
):
    spied, spy = watched(pipeline, no_memory)
    spied._components = replace(
        spied._components,
        device=torch.device("cuda:1"),
        plan=replace(spied._components.plan, mode=mode),
    )
    advice = spied._advice(request_for(width=1000))
    assert f"1000 × 512 pixels does not fit into what is free of the memory of cuda:1, with --memory {mode}" in advice  # fmt: skip # noqa: E501
    assert ("or start the server with --memory offload" in advice) == (mode == "resident")
    spied, spy = watched(pipeline, no_memory)
    with pytest.raises(DeviceMemoryError, match=r"512 × 512 .* a smaller one .*Tried to allocate"):
        list(spied.generate(request_for(num_images=2)))
    assert spy.sizes == [(2, 0), (1, 0)]


def test_a_lack_of_memory_while_decoding_is_met_in_the_same_way(pipeline, request_for):
    decode, refused = pipeline._components.autoencoder.decode, []

    class Decoder:
        factor, channels = (
            pipeline._components.autoencoder.factor,
            pipeline._components.autoencoder.channels,
        )

        def decode(self, latents):
            if len(refused) < 1:
                refused.append(1)
                no_memory(None, 0)
            return decode(latents)

    parts = replace(pipeline._components, autoencoder=Decoder())
    spied = ReduxPipeline(parts, name="spied", max_batch_size=2)
    results, _ = run(spied.generate_batch([request_for(seed=1), request_for(seed=2)]))
    assert [len(result.images) for result in results.values()] == [1, 1]


# --- devices and models that fail -----------------------------------------------------------------


def test_a_device_that_is_lost_is_told_as_such(pipeline, request_for):
    def fail(img, step):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    spied, spy = watched(pipeline, fail)
    with pytest.raises(DeviceError, match="device-side assert"):
        list(spied.generate_batch([request_for(seed=1), request_for(seed=2)]))
    assert spy.sizes == [(2, 0)], "it must not be tried again here"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_spoils_its_own_request_only(
    value, pipeline, request_for, finish, difference
):
    def fail(img, step):
        def spoil(velocity):
            velocity = velocity.clone()
            velocity[1, 0, 0] = value
            return velocity

        return spoil if step == 1 and len(img) > 1 else None

    spied, _ = watched(pipeline, fail)
    requests = [request_for(seed=1), request_for(seed=2, num_images=2)]
    results, _ = run(spied.generate_batch(requests))
    assert isinstance(results[0], Result)
    assert isinstance(results[1], OutputError)
    assert "not finite" in str(results[1])
    alone = finish(pipeline.generate(requests[0])).images[0]
    assert difference(results[0].images[0], alone) <= 1
    with pytest.raises(OutputError, match="weights are damaged"):
        list(spied.generate(requests[1]))


def test_further_images_of_a_spoiled_request_are_not_made(pipeline, request_for):
    spied, spy = watched(
        pipeline, lambda img, step: lambda velocity: velocity * float("nan"), max_batch_size=1
    )
    with pytest.raises(OutputError):
        list(spied.generate(request_for(num_images=4)))
    assert len(spy.sizes) == 2


def test_a_preprocessed_request_gives_bitwise_the_same_images(pipeline, request_for, finish):
    request = request_for(images=PICTURES, fit="letterbox", mask=Image.new("L", (40, 50), 255))
    encoder, images = pipeline._components.image_encoder, []
    for each in (request, pipeline.preprocess(request)):
        encoder.cache.clear()
        images.append(finish(pipeline.generate(each)).images[0].tobytes())
    assert images[0] == images[1]


# --- which device is current ----------------------------------------------------------------------


@pytest.fixture
def on_second_gpu(pipeline, monkeypatch):
    """A pipeline for cuda:1 of two, which cannot compute, and these two."""
    gpus = PretendedGpus(2).install(monkeypatch)
    components = replace(pipeline._components, device=torch.device("cuda:1"))
    monkeypatch.setattr(ReduxPipeline, "_check_memory", lambda *_: None)
    return ReduxPipeline(components, name="second"), gpus


def test_images_are_made_with_their_device_current(on_second_gpu, request_for, monkeypatch):
    second, gpus = on_second_gpu
    seen = []

    def run(self, requests, quality):
        try:
            for step in range(2):
                seen.append(gpus.current)
                yield 0, Progress(step, 2)
        finally:
            seen.append(gpus.current)

    monkeypatch.setattr(ReduxPipeline, "_run", run)
    for take in (lambda events: list(events), lambda events: (next(events), events.close())):
        take(second.generate(request_for()))
        assert seen[0] == 1
        assert set(seen) == {1}
        assert gpus.current == 0
        seen.clear()


def test_it_is_compiled_with_its_device_current(on_second_gpu, monkeypatch):
    second, gpus = on_second_gpu
    seen = []
    monkeypatch.setattr(
        "redux_pipelines.pipeline.warm_up", lambda *_, **__: seen.append(gpus.current)
    )
    second.compile(CompilePlan("full"))
    assert seen == [1]
    assert gpus.current == 0


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bfloat16_on_a_gpu_looks_like_float32_on_a_cpu(tiny, pipeline, load, request_for, finish):
    request = request_for(num_inference_steps=4)
    reference = np.asarray(finish(pipeline.generate(request)).images[0]).astype(float)
    fast = load(tiny, device="cuda", dtype="auto")
    assert (fast.info.device, fast.info.dtype) == ("cuda:0", "bfloat16")
    image = np.asarray(finish(fast.generate(request)).images[0]).astype(float)
    mean_square = ((image - reference) ** 2).mean()
    assert 10 * np.log10(255**2 / mean_square) > 20


def test_the_sizes_of_a_plan_and_what_has_room_reach_the_warm_up(pipeline, monkeypatch):
    asked = {}

    def record(denoiser, plan, grids, batches, **rest):
        asked.update(plan=plan, grids=grids, batches=batches, **rest)

    monkeypatch.setattr(pipeline_module, "warm_up", record)
    components, limits = pipeline._components, GraphLimits(3, 2000)
    planned = replace(components, plan=replace(components.plan, graphs=limits))
    plan = CompilePlan("off", sizes=((1024, 768),), cuda_graphs="auto")
    ReduxPipeline(planned, name="tiny").compile(plan)
    assert asked["grids"] == [Grid(12, 16)]  # of 64 pixels each
    assert (asked["least"], asked["batches"]) == (Grid(4, 4), (1,))
    assert (asked["plan"], asked["limits"]) == (plan, limits)


def test_graphed_steps_make_the_same_pictures(tiny, load, request_for, finish):
    """Two requests of a shape: all steps but the first are replayed."""
    plain, graphed = load(tiny), load(tiny)
    denoiser, capture = graphed._components.denoiser, FakeCapture()
    denoiser.graphed = GraphedStep(denoiser.flux, capture, 2)
    for seed in (1, 2):
        wanted, made = (
            finish(each.generate(request_for(seed=seed))).images[0] for each in (plain, graphed)
        )
        assert made.tobytes() == wanted.tobytes()
    assert [each.replays for each in capture.made] == [2 + 3]
    assert denoiser.graphed.failure is None
