"""A row of the table is what diffusers computes at that step."""

import pytest
import torch

from pipelines import networks
from pipelines.networks import CPU, SCHEDULE, conditioning, diffusers_model, engine, predict
from redux_pipelines.network.modulation import DOUBLE_ROWS, SINGLE_ROWS
from redux_pipelines.sampling import Grid, Schedule


def _table(denoiser, given, schedule=SCHEDULE):
    with torch.inference_mode():
        return denoiser.prepare(given, schedule, Grid(1, 1)).modulation


@torch.inference_mode()
def _of_diffusers(model, given, step):
    """Every modulation, in the order of the table, from diffusers' own layers."""
    time = torch.tensor([SCHEDULE.sigmas[step]]).mul(1000).to(model.dtype) / 1000 * 1000
    guidance = torch.tensor([given.guidance]).to(model.dtype) * 1000
    scales = (time, guidance) if model.config.guidance_embeds else (time,)
    temb = torch.nn.functional.silu(model.time_text_embed(*scales, given.vec[None]))
    layers = [
        layer
        for block in model.transformer_blocks
        for layer in (block.norm1.linear, block.norm1_context.linear)
    ]
    layers += [block.norm.linear for block in model.single_transformer_blocks]
    rows = [layer(temb)[0].chunk(len(layer.bias) // temb.shape[1]) for layer in layers]
    rows.append(model.norm_out.linear(temb)[0].chunk(2))
    return rows


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_rows_are_the_modulations_of_diffusers(guidance, step):
    model = diffusers_model(torch.float64, guidance_embeds=guidance)
    given = conditioning(model)
    table = _table(engine(model), given)
    assert table.shape == (3, 2 * 2 * DOUBLE_ROWS + 3 * SINGLE_ROWS + 2, 48)
    ours, scales = iter(table[step]), {6: (1, 4), 3: (1,), 2: (0,)}
    for layer in _of_diffusers(model, given, step):
        for place, expected in enumerate(layer):
            one = 1 if place in scales[len(layer)] else 0
            torch.testing.assert_close(next(ours), expected + one, rtol=0, atol=1e-12)
    assert next(ours, None) is None


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [({"guidance": 2.0}, SCHEDULE), ({"seed": 9}, SCHEDULE), ({}, Schedule((1.0, 0.5, 0.0)))],
    ids=["guidance", "pooled text", "schedule"],
)
def test_a_table_belongs_to_one_schedule_guidance_and_pooled_text(fields, schedule):
    model = diffusers_model()
    denoiser = engine(model)
    first = _table(denoiser, conditioning(model))
    assert _table(denoiser, conditioning(model)) is first
    other = _table(denoiser, conditioning(model, **fields), schedule)
    assert other.shape != first.shape or (other - first).abs().max() > 1e-3
    assert denoiser.caches["modulations"].stats.misses == 2


def test_guidance_makes_no_second_table_for_a_model_without_it():
    model = diffusers_model(guidance_embeds=False)
    denoiser = engine(model)
    low, high = (_table(denoiser, conditioning(model, guidance=scale)) for scale in (1.0, 9.0))
    assert low is high


def test_evicted_weights_give_identical_results():
    model, grid = diffusers_model(), Grid(3, 4)
    given, img = conditioning(model), networks.noise(model, grid)
    expected = predict(engine(model), given, grid, img)
    evicted = engine(model, evict_modulation=True)
    assert torch.equal(predict(evicted, given, grid, img), expected)


def test_a_warm_table_needs_no_modulation_weights():
    model, grid = diffusers_model(), Grid(3, 4)
    given, img = conditioning(model), networks.noise(model, grid)
    denoiser = engine(model)
    expected = predict(denoiser, given, grid, img)
    del denoiser._flux.modulation
    assert torch.equal(predict(denoiser, given, grid, img), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_evicted_weights_are_not_on_the_gpu_and_give_the_same_table():
    from redux_pipelines.loading.flux_weights import load_flux
    from redux_pipelines.network.flux import FluxParams

    model, cuda = diffusers_model(), torch.device("cuda")
    times, guidance = (torch.tensor(each, device=cuda) for each in ([900.0, 10.0], [3500.0]))
    tables = []
    for is_evicted in (False, True):
        flux = load_flux(
            FluxParams.of(model.config),
            model.state_dict(),
            device=cuda,
            dtype=torch.float32,
            evict_modulation=is_evicted,
        )
        with torch.inference_mode():
            tables.append(flux.modulation.table(times, guidance, torch.ones(20, device=cuda)))
    assert torch.equal(*tables)
    weight = flux.modulation.layers[0].weight
    assert weight.device == CPU
    assert weight.is_pinned()
    assert flux.img_in.weight.device.type == "cuda"
