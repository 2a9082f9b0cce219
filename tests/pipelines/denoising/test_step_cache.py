"""The step cache against a brute-force model of itself, against diffusers' blocks, and in a run."""

import gc
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines import networks
from pipelines.networks import conditioning, diffusers_model, engine, error, noise, small_grid
from redux_pipelines import pipeline as pipeline_module
from redux_pipelines.denoising.quality import TIERS, CachePolicy, Tier
from redux_pipelines.denoising.step_cache import StepCache, relative_change
from redux_pipelines.errors import RequestError
from redux_pipelines.network.layers import within_range_
from redux_pipelines.pipeline import ReduxPipeline
from redux_pipelines.sampling import Schedule

ALWAYS = math.inf


def schedule_of(steps):
    return Schedule(tuple(1 - step / steps for step in range(steps + 1)))


def distance(now, former):
    """The largest relative L1 distance of a batch, in float64."""
    now, former = (each.double().numpy() for each in (now, former))
    pairs = zip(now, former, strict=True)
    return max(np.abs(one - two).sum() / np.abs(two).sum() for one, two in pairs)


def brute_force(changes, policy):
    """Which steps are computed ("C") and which reused ("r"), from their whole history each time."""
    told = ""
    for step, change in enumerate(changes):
        is_inside = policy.warm_up <= step < len(changes) - policy.final
        reused_in_a_row = len(told) - len(told.rstrip("r"))
        computed = [index for index, each in enumerate(told) if each == "C"]
        told += (
            "r"
            if computed
            and is_inside
            and reused_in_a_row < policy.max_hits
            and distance(change, changes[computed[-1]]) < policy.threshold
            else "C"
        )
    return told


def on_the_line(computed, step):
    """The value at ``step`` of the line through the last two of ``computed`` (step, value)."""
    if len(computed) == 1:
        return computed[0][1]
    (one, low), (two, high) = computed[-2:]
    return low + (high - low) * (step - one) / (two - one)


def play(changes, policy):
    """The same from the cache itself, and that what it hands out lies on a line."""
    cache, told, computed = StepCache(policy, len(changes)), "", []
    for step, change in enumerate(changes):
        rest = cache.recall(change, step)
        if rest is None:
            computed.append((step, math.sin(step)))
            cache.keep(change, torch.full((1, 2), math.sin(step), dtype=torch.float64), step)
        else:
            assert rest.tolist()[0] == pytest.approx([on_the_line(computed, step)] * 2)
        told += "C" if rest is None else "r"
    assert cache.reused == told.count("r")
    return told


@pytest.mark.parametrize("seed", range(40))
def test_decisions_are_those_of_a_brute_force_model(seed):
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(int(random.integers(1, 4)), 3, 5, generator=generator)
    walk = [start]
    for _ in range(int(random.integers(1, 30))):
        walk.append(walk[-1] + 0.05 * torch.randn(start.shape, generator=generator))
    policy = CachePolicy(
        threshold=float(random.choice([0.0, 0.05, 0.08, 0.12, 0.3, ALWAYS])),
        warm_up=int(random.integers(0, 6)),
        max_hits=int(random.integers(0, 5)),
        final=int(random.integers(0, 4)),
    )
    assert play(walk, policy) == brute_force(walk, policy)


SEQUENCES = {
    (1, 0, 9, 0): "C",
    (3, 0, 9, 0): "Crr",
    (4, 4, 3, 1): "CCCC",
    (6, 4, 3, 1): "CCCCrC",
    (12, 3, 2, 1): "CCCrrCrrCrrC",
    (12, 2, 1, 3): "CCrCrCrCrCCC",
    (9, 1, 9, 2): "CrrrrrrCC",
    (9, 1, 0, 1): "CCCCCCCCC",
}


@pytest.mark.parametrize(("numbers", "expected"), SEQUENCES.items(), ids=str)
def test_without_a_threshold_only_the_bounds_decide(numbers, expected):
    steps, warm_up, max_hits, final = numbers
    assert play([torch.ones(1, 2, 2)] * steps, CachePolicy(ALWAYS, warm_up, max_hits, final)) == (
        expected
    )


def test_what_is_not_a_number_is_computed():
    policy = CachePolicy(ALWAYS, 1, 9, 0)
    assert play([torch.full((1, 2, 2), math.nan)] * 4, policy) == "CCCC"
    assert play([torch.zeros(1, 2, 2)] * 4, policy) == "CCCC"


def test_the_image_of_a_batch_that_changed_most_counts():
    former, now = torch.ones(3, 2, 4), torch.ones(3, 2, 4)
    now[1] *= 1.5
    now[2] *= 0.9
    assert float(relative_change(now, former)) == pytest.approx(0.5)
    assert float(relative_change(now[2:], former[2:])) == pytest.approx(0.1)
    assert float(relative_change(now * 8, former * 8)) == pytest.approx(0.5)


def test_half_precision_is_summed_in_float32():
    former = torch.full((1, 64, 2048), 4.0, dtype=torch.float16)  # the sum exceeds float16
    change = relative_change(former * 1.25, former)
    assert change.dtype == torch.float32
    assert float(change) == pytest.approx(0.25)


# --- the network ----------------------------------------------------------------------------------


def started(denoiser, model, policy, steps=5):
    prepared = denoiser.prepare(conditioning(model), schedule_of(steps), small_grid())
    return prepared, prepared.start(Tier(policy))


@pytest.mark.parametrize("layers", [(2, 3), (1, 1), (3, 0), (0, 2)], ids=str)
@torch.inference_mode()
def test_blocks_may_be_run_in_parts(layers):
    model = diffusers_model(num_layers=layers[0], num_single_layers=layers[1])
    flux = engine(model)._flux
    prepared = engine(model).prepare(conditioning(model), networks.SCHEDULE, small_grid())
    img, mod, context = (
        noise(model, small_grid(), batch=2),
        prepared.modulation[1],
        prepared.context,
    )
    whole = prepared.predict(img, 1)
    for split in range(flux.num_blocks + 1):
        x = flux.run(flux.embed(img, prepared.txt), mod, context, 0, split)
        if split < flux.num_blocks:
            x = flux.run(x, mod, context, split, flux.num_blocks)
        assert torch.equal(flux.project_out(x, mod, context), whole)


@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_at_threshold_0_every_step_is_exact_to_the_bit(model, ours, batch):
    prepared, run = started(ours, model, CachePolicy(0.0, 0, 9, 0))
    img = noise(model, small_grid(), batch)
    before = img.clone()
    for step in range(5):
        assert torch.equal(run.predict(img, step), prepared.predict(img, step))
    assert run.reused == 0
    assert torch.equal(img, before)


class Watched:
    """What goes in and out of diffusers' blocks at each forward."""

    def __init__(self, model):
        self.model, self.first, self.last, self.temb = model, None, None, None
        model.transformer_blocks[0].register_forward_hook(self._see_first)
        model.single_transformer_blocks[-1].register_forward_hook(self._see_last)
        model.time_text_embed.register_forward_hook(self._see_time)

    def _see_first(self, _module, _given, out):
        self.first = out[1].clone()

    def _see_last(self, _module, _given, out):
        self.last = out[1].clone()

    def _see_time(self, _module, _given, out):
        self.temb = out

    def project(self, hidden):
        return self.model.proj_out(self.model.norm_out(hidden, self.temb))


@torch.inference_mode()
def test_a_reused_step_adds_what_diffusers_blocks_added_before_continued(ours):
    watched = Watched(diffusers_model())
    model, grid, given = watched.model, small_grid(), conditioning(watched.model)
    run = ours.prepare(given, schedule_of(5), grid).start(Tier(CachePolicy(ALWAYS, 2, 9, 1)))
    rests = []
    for step, is_reused in enumerate([False, False, True, True, False]):
        img = noise(model, grid, batch=2, seed=step)
        expected = networks.oracle(model, given, grid, img, step, schedule_of(5))
        if is_reused:
            rest = rests[1] + (rests[1] - rests[0]) * (step - 1)
            expected = watched.project(watched.first + rest)
        else:
            rests.append(watched.last - watched.first)
        assert error(run.predict(img, step), expected) <= 1e-5, step
    assert run.reused == 2


@torch.inference_mode()
def test_a_reused_step_runs_one_block(model, ours, monkeypatch):
    spans = []
    flux = ours._flux
    original = flux.run

    def spy(x, mod, context, first, end):
        spans.append((first, end))
        return original(x, mod, context, first, end)

    monkeypatch.setattr(flux, "run", spy, raising=False)
    _, run = started(ours, model, CachePolicy(ALWAYS, 1, 1, 1))
    for step in range(5):
        run.predict(noise(model, small_grid()), step)
    assert spans == [(0, 1), (1, 5), (0, 1), (0, 1), (1, 5), (0, 1), (0, 1), (1, 5)]


@torch.inference_mode()
def test_a_batch_that_is_reused_holds_the_reused_images(model, ours):
    img = noise(model, small_grid(), batch=3)
    policy = CachePolicy(ALWAYS, 2, 9, 0)
    _, together = started(ours, model, policy)
    alone = [started(ours, model, policy)[1] for _ in range(3)]
    for step in range(4):
        velocity = together.predict(img, step)
        for index, run in enumerate(alone):
            single = run.predict(img[index : index + 1], step)
            assert error(velocity[index : index + 1], single) <= 1e-6
    assert together.reused == alone[0].reused == 2


def test_a_line_through_float16s_ends_stays_within_it():
    cache, ones = StepCache(CachePolicy(ALWAYS, 2, 9, 0), 4), torch.ones(1, 1, 2).half()
    cache.keep(ones, ones * -60000, 0)
    cache.keep(ones, ones * 60000, 1)
    assert within_range_(ones * 7 + cache.recall(ones, 2)).tolist() == [[[65504.0] * 2]]


def test_what_is_added_stays_within_float16():
    huge = torch.tensor([[[math.inf, -math.inf, 7.0]]], dtype=torch.float16)
    assert within_range_(huge).tolist() == [[[65504.0, -65504.0, 7.0]]]
    assert within_range_(huge.float() * math.inf).isinf().all()


# --- the pipeline ---------------------------------------------------------------------------------


@pytest.fixture
def with_policy(monkeypatch):
    """Makes ``fast`` mean this policy."""

    def use(*numbers):
        tiers = {**TIERS, "fast": Tier(CachePolicy(*numbers))}
        monkeypatch.setattr(pipeline_module, "TIERS", tiers)

    return use


def test_a_tier_of_threshold_0_gives_the_exact_picture(
    with_policy, pipeline, request_for, finish, difference
):
    with_policy(0.0, 0, 9, 0)
    request = request_for(num_inference_steps=5, prompt="a red fox")
    exact = finish(pipeline.generate(request))
    cached = finish(pipeline.generate(replace(request, quality="fast")))
    assert difference(exact.images[0], cached.images[0]) == 0
    assert (exact.quality, exact.computed_steps, exact.reused_steps) == ("exact", 5, 0)
    assert (cached.quality, cached.computed_steps, cached.reused_steps) == ("fast", 5, 0)


def test_steps_are_counted_for_each_image(with_policy, pipeline, load, tiny, request_for, finish):
    with_policy(ALWAYS, 2, 2, 1)  # CCrrC
    request = request_for(num_inference_steps=5, num_images=3, quality="fast")
    for through in (pipeline, load(tiny, max_batch_size=2)):
        result = finish(through.generate(request))
        assert (result.computed_steps, result.reused_steps) == (9, 6)


def test_image_i_is_bitwise_the_single_image_with_seed_plus_i_in_a_tier_too(
    with_policy, pipeline, request_for, finish, difference
):
    with_policy(ALWAYS, 1, 2, 1)
    request = request_for(num_inference_steps=5, quality="fast", seed=10)
    three = finish(pipeline.generate(replace(request, num_images=3)))
    exact = finish(pipeline.generate(replace(request, quality="exact")))
    for seed, image in zip(three.seeds, three.images, strict=True):
        single = finish(pipeline.generate(replace(request, seed=seed))).images[0]
        assert difference(image, single) == 0
    assert difference(three.images[0], exact.images[0]) > 0


def test_interleaved_runs_keep_their_own_caches(
    with_policy, pipeline, request_for, finish, difference
):
    with_policy(ALWAYS, 1, 2, 1)
    first = request_for(num_inference_steps=5, quality="fast")
    second = replace(first, seed=5, num_inference_steps=6)
    alone = [finish(pipeline.generate(request)).images[0] for request in (first, second)]
    running = [pipeline.generate(request) for request in (first, second)]
    last = [None, None]
    while any(running):
        for index, events in enumerate(running):
            event = next(events, None) if events else None
            last[index] = event or last[index]
            running[index] = events if event else None
    assert [difference(last[index].images[0], alone[index]) for index in (0, 1)] == [0, 0]


@pytest.fixture
def kept(monkeypatch):
    """Weak references to all that any step cache keeps."""
    tensors, original = [], StepCache.keep

    def keep(self, change, rest, step):
        original(self, change, rest, step)
        last = self._last
        tensors.extend(weakref.ref(each) for each in (change, rest, last.slope) if each is not None)

    monkeypatch.setattr(StepCache, "keep", keep)
    return tensors


def alive(tensors):
    return sum(tensor() is not None for tensor in tensors)


def test_closing_a_run_midway_frees_its_cache(with_policy, kept, pipeline, request_for):
    with_policy(ALWAYS, 2, 9, 1)
    events = pipeline.generate(request_for(num_inference_steps=6, quality="fast"))
    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        for _ in range(4):
            next(events)
        assert (len(kept), alive(kept)) == (5, 3)  # two steps computed, the last one held
        events.close()
        assert alive(kept) == 0
    finally:
        gc.enable()


def test_the_cache_is_gone_before_the_picture_is_decoded(
    with_policy, kept, pipeline, request_for, finish
):
    with_policy(ALWAYS, 1, 9, 1)
    left, decode = [], pipeline._components.autoencoder.decode

    class Decoder:
        factor, channels = (
            pipeline._components.autoencoder.factor,
            pipeline._components.autoencoder.channels,
        )

        def decode(self, latents):
            left.append(alive(kept))
            return decode(latents)

    parts = replace(pipeline._components, autoencoder=Decoder())
    request = request_for(num_inference_steps=4, quality="fast", num_images=2)
    finish(ReduxPipeline(parts, name="spied").generate(request))
    assert len(kept) == 10  # two images, of which two steps each are computed
    assert left == [0, 0]


@pytest.mark.parametrize("name", ["balanced", "fast"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps_are_never_reused(name, steps, monkeypatch, tiny_schnell, load, request_for):
    policy = replace(TIERS[name].cache, threshold=ALWAYS)
    monkeypatch.setattr(pipeline_module, "TIERS", {name: Tier(policy)})
    request = request_for(num_inference_steps=steps, quality=name)
    *_, result = load(tiny_schnell).generate(request)
    assert (result.computed_steps, result.reused_steps) == (steps, 0)


def test_the_pipelines_tier_is_that_of_requests_that_name_none(tiny, load, request_for, finish):
    pipeline = load(tiny, quality="balanced")
    assert finish(pipeline.generate(request_for())).quality == "balanced"
    assert finish(pipeline.generate(request_for(quality="exact"))).quality == "exact"
    assert finish(load(tiny).generate(request_for())).quality == "exact"


def test_diffusers_refuses_tiers_it_does_not_have(tiny, load, request_for, finish):
    pipeline = load(tiny, backend="diffusers")
    with pytest.raises(RequestError, match=r"'fast' is not available .* 'diffusers', .* 'exact'"):
        pipeline.generate(request_for(quality="fast"))
    assert finish(pipeline.generate(request_for(quality="exact"))).quality == "exact"
    with pytest.raises(ValueError, match="quality='fast' needs backend='engine'"):
        load(tiny, backend="diffusers", quality="fast")
    with pytest.raises(RequestError, match="not available"):
        ReduxPipeline(pipeline._components, name="none", quality="fast")
