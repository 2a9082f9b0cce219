"""A rank's share of the engine: what all ranks have to agree on."""

import pytest
import torch

from pipelines import networks
from pipelines.parallel_threads import on_ranks
from redux_pipelines.denoising.sharded import ShardedEngine
from redux_pipelines.denoising.step_cache import relative_change
from redux_pipelines.parallel.shares import Shares


@pytest.mark.parametrize("count", [2, 4])
def test_a_step_cache_is_told_the_change_of_all_rows(tmp_path, count):
    model, grid = networks.diffusers_model(num_attention_heads=4), networks.small_grid(5, 5)
    generator = torch.Generator().manual_seed(0)
    former, step = torch.randn(2, 2, 25, 8, generator=generator)
    now = former + step * torch.linspace(0.0, 2.0, 25)[:, None]  # ranks see less or more of it
    given, slices = networks.conditioning(model), Shares.of(25, count).slices

    def work(group):
        own = ShardedEngine(networks.engine(model), group)
        measure = own.prepare(given, networks.SCHEDULE, grid).measure
        rows = slices[group.rank]
        return float(measure(now[:, rows], former[:, rows]))

    told = on_ranks(tmp_path, count, work)
    assert len(set(told)) == 1
    assert told[0] == pytest.approx(float(relative_change(now, former)), rel=1e-6)
    assert abs(float(relative_change(now[:, slices[0]], former[:, slices[0]])) - told[0]) > 0.1
