"""The arithmetic against diffusers' and against itself."""

import pytest
import torch

from redux_pipelines import sampling
from redux_pipelines.sampling import Grid


@pytest.mark.parametrize(
    ("size", "multiple", "grid"),
    [
        ((1024, 1024), 16, Grid(64, 64)),
        ((520, 1000), 16, Grid(63, 33)),
        ((512, 513), 64, Grid(9, 8)),
    ],
    ids=str,
)
def test_grid_covers_the_size(size, multiple, grid):
    assert sampling.grid_for(*size, multiple) == grid


def test_unpacking_undoes_packing():
    latents = torch.randn(2, 4, 6, 10)
    assert torch.equal(sampling.unpack(sampling.pack(latents), Grid(3, 5)), latents)


def test_packing_and_ids_are_those_of_diffusers():
    from diffusers import FluxPipeline

    latents = torch.randn(1, 4, 6, 10)
    assert torch.equal(sampling.pack(latents), FluxPipeline._pack_latents(latents, 1, 4, 6, 10))
    theirs = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(sampling.image_ids(Grid(3, 5)), theirs)


def test_noise_depends_on_the_seed_alone():
    grid = Grid(4, 4)
    torch.manual_seed(1)
    first = sampling.noise(3, 16, grid)
    state = torch.random.get_rng_state()
    again = sampling.noise(3, 16, grid)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.shape == (1, 16, 8, 8)
    assert not torch.equal(first, sampling.noise(4, 16, grid))


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (1024, 0.63)])
def test_shift_grows_linearly_with_tokens(tokens, mu):
    assert sampling.shift_mu(tokens, {}) == pytest.approx(mu)


def test_schedule_is_that_of_diffusers(pipeline):
    from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

    template = pipeline._components.scheduler
    ours = sampling.start(template, 7, 64, torch.device("cpu"))
    theirs = type(template).from_config(template.config)
    sigmas = torch.linspace(1.0, 1 / 7, 7, dtype=torch.float64).tolist()
    retrieve_timesteps(theirs, sigmas=sigmas, mu=sampling.shift_mu(64, theirs.config))
    assert torch.equal(ours.timesteps, theirs.timesteps)
    schedule = sampling.schedule_of(ours)
    assert schedule.steps == 7
    assert (schedule.sigmas[0], schedule.sigmas[-1]) == (1.0, 0.0)
    assert list(schedule.sigmas) == sorted(schedule.sigmas, reverse=True)


def test_starting_leaves_the_template_alone(pipeline):
    template = pipeline._components.scheduler
    before = template.timesteps.clone()
    started = sampling.start(template, 3, 64, torch.device("cpu"))
    assert torch.equal(template.timesteps, before)
    assert started is not template


def test_every_seed_of_the_range_has_noise_of_its_own():
    grid = Grid(2, 3)
    low = (0, 1, 7, 1_410_065_407, 2**31, 2**32 - 1)
    seeds = [s + high * 2**32 for s in low for high in range(3)] + [2**62, 2**62 + 1, 2**32 + 2**40]
    drawn = [sampling.noise(seed, 16, grid) for seed in seeds]
    assert len({each.numpy().tobytes() for each in drawn}) == len(seeds)
    for each, seed in zip(drawn, seeds, strict=True):
        assert (each.shape, each.dtype) == ((1, 16, 4, 6), torch.float32)
        assert torch.equal(each, sampling.noise(seed, 16, grid))


def test_noise_of_seeds_below_2_to_the_32_is_torchs():
    for seed in (0, 5, 2**31, 2**32 - 1):
        generator = torch.Generator("cpu").manual_seed(seed)
        expected = torch.randn((1, 16, 4, 6), generator=generator)
        assert torch.equal(sampling.noise(seed, 16, Grid(2, 3)), expected)


def test_noise_of_large_seeds_is_standard_normal_and_independent():
    drawn = torch.stack([sampling.noise(2**32 + seed, 16, Grid(32, 32)) for seed in range(8)])
    flat = drawn.flatten(1).double()
    assert flat.mean().abs() < 0.01 and (flat.std() - 1).abs() < 0.01
    correlation = torch.corrcoef(
        torch.cat([flat, sampling.noise(0, 16, Grid(32, 32)).flatten()[None]])
    )
    assert (correlation - torch.eye(9, dtype=torch.float64)).abs().max() < 0.02
