"""What the tiers cost and spare, on the embedded model: its held-out icons at 512 × 512.

The floors are those that a tier promises; what is measured now lies well above them.
"""

import numpy as np
import pytest
import torch

from redux_pipelines.contract.types import QUALITIES, GenerationRequest
from redux_pipelines.denoising.quality import TIERS, CachePolicy
from redux_pipelines.loading.load import load_pipeline
from training import metrics
from training.icons import held_out

CHOSEN = (4, 58, 94)
STEPS = 28
FLOORS = {"balanced": (33.0, 0.95), "fast": (28.0, 0.95)}
HITS = {"balanced": (10, 12), "fast": (14, 18)}


@pytest.fixture(scope="module")
def icons():
    """Three of the concepts that the model never saw."""
    return held_out(CHOSEN)


@pytest.fixture(scope="module")
def run():
    pipeline = load_pipeline(model="mini", device="cpu", dtype="float32")

    def run(image, quality, **fields):
        request = GenerationRequest(image, width=512, height=512, quality=quality, **fields)
        *_, result = pipeline.generate(request)
        return result

    return run


@pytest.fixture(scope="module")
def results(icons, run):
    return {quality: [run(icon, quality) for icon in icons] for quality in QUALITIES}


def likeness(results, quality):
    """PSNR and SSIM against ``exact`` of each icon."""
    pairs = [
        tuple(metrics.to_tensor(result.images) for result in pair)
        for pair in zip(results["exact"], results[quality], strict=True)
    ]
    return [metrics.psnr(*pair) for pair in pairs], [metrics.ssim(*pair) for pair in pairs]


@pytest.mark.parametrize("quality", FLOORS)
def test_every_picture_of_a_tier_is_like_the_exact_one(quality, results):
    psnr, ssim = likeness(results, quality)
    floor_psnr, floor_ssim = FLOORS[quality]
    assert min(psnr) >= floor_psnr
    assert np.mean(psnr) >= floor_psnr + 2
    assert min(ssim) >= floor_ssim
    assert max(psnr) < 90  # something was approximated


@pytest.mark.parametrize("quality", HITS)
def test_a_tier_spares_steps(quality, results):
    fewest, most = HITS[quality]
    for result in results[quality]:
        assert fewest <= result.reused_steps <= most
        assert result.computed_steps + result.reused_steps == STEPS
        assert result.quality == quality


def test_exact_spares_none(results):
    assert [result.reused_steps for result in results["exact"]] == [0] * len(CHOSEN)
    assert [result.computed_steps for result in results["exact"]] == [STEPS] * len(CHOSEN)


@pytest.mark.parametrize("quality", FLOORS)
def test_a_tier_is_deterministic(quality, icons, run, results):
    again, first = run(icons[0], quality), results[quality][0]
    assert again.images[0].tobytes() == first.images[0].tobytes()
    assert again.reused_steps == first.reused_steps


@pytest.mark.parametrize("quality", FLOORS)
def test_four_steps_are_exact_in_every_tier(quality, icons, run):
    exact, cached = (run(icons[0], each, num_inference_steps=4) for each in ("exact", quality))
    assert cached.images[0].tobytes() == exact.images[0].tobytes()
    assert (cached.computed_steps, cached.reused_steps) == (4, 0)


def test_tiers_are_ordered():
    policies = [TIERS[quality].cache for quality in QUALITIES]
    assert policies[0] is None
    balanced, fast = policies[1:]
    assert 0 < balanced.threshold < fast.threshold < 1
    assert min(balanced.warm_up, fast.warm_up) >= 4  # FLUX.1-schnell's steps
    assert 1 <= balanced.max_hits <= fast.max_hits
    assert min(balanced.final, fast.final) >= 1


def test_the_first_step_is_never_reused():
    assert not CachePolicy(1.0, 0, 9, 0).may_reuse(0, 5, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("quality", FLOORS)
def test_a_tier_keeps_its_floors_on_a_gpu_in_bfloat16(quality, icons):
    pipeline = load_pipeline(model="mini", device="cuda")
    made = {}
    for each in ("exact", quality):
        request = GenerationRequest(icons[0], width=512, height=512, quality=each)
        *_, made[each] = pipeline.generate(request)
    exact, other = (metrics.to_tensor(made[each].images) for each in made)
    assert metrics.psnr(exact, other) >= FLOORS[quality][0]
    assert HITS[quality][0] <= made[quality].reused_steps <= HITS[quality][1]
