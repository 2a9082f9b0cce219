"""Images of several requests denoised together: the same as alone, each to its own."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import networks
from redux_pipelines import pipeline as pipeline_module
from redux_pipelines.contract.types import Progress, Result
from redux_pipelines.denoising.quality import TIERS, CachePolicy, Tier
from redux_pipelines.errors import DeviceError, DeviceMemoryError, OutputError, RequestError
from redux_pipelines.fake import FakePipeline
from redux_pipelines.network.onednn_operators import OneDnnOperators
from redux_pipelines.network.operators import KernelOperators, TorchOperators
from redux_pipelines.pipeline import ReduxPipeline

GREEN = Image.new("RGB", (64, 64), "green")


def run(events):
    """Results by place, and what was told of progress by place."""
    results, steps = {}, {}
    for place, event in events:
        if isinstance(event, Progress):
            assert place not in results
            steps.setdefault(place, []).append(event.step)
        else:
            assert place not in results
            results[place] = event
    return results, steps


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 9])
@pytest.mark.parametrize(
    "operators", [TorchOperators(), KernelOperators(), OneDnnOperators()], ids=lambda o: o.name
)
@torch.inference_mode()
def test_each_row_of_a_batch_is_its_own_request(operators, copies):
    model = networks.diffusers_model()
    denoiser, grid = networks.engine(model, operators=operators), networks.small_grid()
    given = [
        networks.conditioning(model, copies=copies, seed=seed, guidance=guidance)
        for seed, guidance in ((1, 3.5), (2, 1.0), (3, 9.0))
    ]
    prepared = [denoiser.prepare(each, networks.SCHEDULE, grid) for each in given]
    rows = [prepared[0], prepared[1], prepared[1], prepared[2]]
    img = networks.noise(model, grid, batch=4)
    before = img.clone()
    for step in range(3):
        together = denoiser.join(rows).predict(img, step)
        for place, (row, owner) in enumerate(zip(rows, (0, 1, 1, 2), strict=True)):
            one = img[place : place + 1]
            theirs = networks.oracle(model, given[owner], grid, one, step)
            assert networks.error(together[place : place + 1], row.predict(one, step)) <= 1e-5
            assert networks.error(together[place : place + 1], theirs) <= 1e-5
    assert torch.equal(img, before)


@torch.inference_mode()
def test_a_cached_run_of_a_batch_reuses_each_rows_own_work():
    model = networks.diffusers_model()
    denoiser, grid = networks.engine(model), networks.small_grid()
    tier = Tier(CachePolicy(float("inf"), 1, 9, 0))
    prepared = [
        denoiser.prepare(networks.conditioning(model, seed=seed), networks.SCHEDULE, grid)
        for seed in (1, 2)
    ]
    together = denoiser.join(prepared).start(tier)
    alone = [each.start(tier) for each in prepared]
    img = networks.noise(model, grid, batch=2)
    for step in range(3):
        velocity = together.predict(img, step)
        for place, single in enumerate(alone):
            one = single.predict(img[place : place + 1], step)
            assert networks.error(velocity[place : place + 1], one) <= 1e-5
    assert together.reused == alone[0].reused == 2


@pytest.mark.parametrize("backend", ["engine", "diffusers"])
def test_rows_of_different_layouts_are_refused(backend):
    model = networks.diffusers_model()
    denoiser = networks.engine(model) if backend == "engine" else networks.DiffusersDenoiser(model)
    grid = networks.small_grid()
    prepared = [
        denoiser.prepare(networks.conditioning(model, text=text), networks.SCHEDULE, grid)
        for text in (7, 4)
    ]
    with pytest.raises(ValueError, match="share a batch"):
        denoiser.join(prepared)


# --- the pipeline ---------------------------------------------------------------------------------


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
    single = ReduxPipeline(pipeline._parts, name="one at a time")
    for place, request in enumerate(requests):
        alone = finish(single.generate(request))
        assert results[place].seeds == alone.seeds
        assert len(results[place].images) == request.num_images
        assert max(map(difference, results[place].images, alone.images)) <= 1
        assert set(results[place].timings) == {"encode_s", "denoise_s", "decode_s"}
        assert (results[place].computed_steps, results[place].reused_steps) == (
            2 * request.num_images,
            0,
        )
    greys = [np.asarray(results[place].images[0]).astype(float) for place in results]
    assert min(np.abs(greys[0] - other).mean() for other in greys[1:]) > 1.0


def test_a_request_is_done_as_soon_as_its_images_are(batched, request_for):
    events = list(batched["engine"].generate_batch(mixed(request_for)))
    told = [(place, type(event).__name__) for place, event in events]
    assert told[-3:] == [(2, "Progress"), (2, "Progress"), (2, "Result")]
    assert [place for place, name in told[:-3] if name == "Result"] == [0, 1]


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
    for place, request in enumerate(requests):
        result, alone = results[place], finish(pipeline.generate(request))
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
    spy = Watched(pipeline._parts.denoiser, fail)
    parts = replace(pipeline._parts, denoiser=spy)
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
    for place, request in enumerate(requests):
        alone = finish(pipeline.generate(request))
        assert list(map(difference, results[place].images, alone.images)) == [0] * len(alone.images)


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
    spied._parts = replace(
        spied._parts, device=torch.device("cuda:1"), plan=replace(spied._parts.plan, mode=mode)
    )
    advice = spied._advice(request_for(width=1000))
    assert f"1000 × 512 pixels does not fit into what is free of the memory of cuda:1, with --memory {mode}" in advice  # fmt: skip # noqa: E501
    assert ("or start the server with --memory offload" in advice) == (mode == "resident")
    spied, spy = watched(pipeline, no_memory)
    with pytest.raises(DeviceMemoryError, match=r"512 × 512 .* a smaller one .*Tried to allocate"):
        list(spied.generate(request_for(num_images=2)))
    assert spy.sizes == [(2, 0), (1, 0)]


def test_a_lack_of_memory_while_decoding_is_met_in_the_same_way(pipeline, request_for):
    decode, refused = pipeline._parts.autoencoder.decode, []

    class Decoder:
        factor, channels = pipeline._parts.autoencoder.factor, pipeline._parts.autoencoder.channels

        def decode(self, latents):
            if len(refused) < 1:
                refused.append(1)
                no_memory(None, 0)
            return decode(latents)

    parts = replace(pipeline._parts, autoencoder=Decoder())
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
