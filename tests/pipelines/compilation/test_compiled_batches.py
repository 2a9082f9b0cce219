"""Batches of several requests, compiled and as CUDA graphs: the same numbers, and few graphs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from pipelines.compilation.test_cuda_graphs import FakeCapture
from pipelines.networks import SCHEDULE, conditioning, diffusers_model, engine, error, noise
from redux_pipelines.compilation.compiled import Compiled
from redux_pipelines.compilation.cuda_graphs import GraphedStep
from redux_pipelines.network.operators import KernelOperators
from redux_pipelines.sampling import Grid

pytestmark = pytest.mark.usefixtures("fresh_compiler")
GRIDS = [Grid(8, 8), Grid(8, 12), Grid(14, 18)]
VARIANTS = [{}, {"copies": 40}, {"text": 3}]


@pytest.fixture(scope="module")
def model():
    return diffusers_model(num_layers=2, num_single_layers=2)


def joined(denoiser, model, grid, batch, **fields):
    """Prepared for ``batch`` images, each with its own tokens and guidance."""
    return denoiser.join(
        [
            denoiser.prepare(
                conditioning(model, seed=seed, guidance=1.0 + seed, **fields), SCHEDULE, grid
            )
            for seed in range(batch)
        ]
    )


@pytest.mark.parametrize(
    ("mode", "layers", "graphs"), [("full", 1, 1), ("blocks", 2, 4)], ids=["full", "blocks"]
)
@torch.inference_mode()
def test_batches_of_any_size_and_prompt_share_their_graphs(mode, layers, graphs):
    """Of a whole step, whose tracing takes long, with one block of each sort."""
    model = diffusers_model(num_layers=layers, num_single_layers=layers)
    denoiser = engine(model, operators=KernelOperators())
    counter = CompileCounterWithBackend("eager")
    denoiser.compiled = Compiled(denoiser.flux, mode, counter)
    for grid, fields in zip(GRIDS, VARIANTS, strict=True):
        for batch in (2, 4):
            prepared = joined(denoiser, model, grid, batch, **fields)
            img = noise(model, grid, batch)
            out = prepared.predict(img, 1)
            with denoiser.compiled.paused():
                assert torch.equal(out, prepared.predict(img, 1))
    assert denoiser.compiled.failure is None
    assert not counters["graph_break"]
    assert counter.frame_count == graphs


@torch.inference_mode()
def test_a_graph_of_a_batch_is_replayed_with_other_requests(model):
    denoiser, plain = engine(model), engine(model)
    denoiser.graphed = GraphedStep(denoiser.flux, FakeCapture(), 2)
    grid, img = GRIDS[0], noise(model, GRIDS[0], 2)
    for guidance in (1.0, 7.0):
        for step in (0, 1):
            ours, wanted = (
                each.join(
                    [
                        each.prepare(
                            conditioning(model, seed=seed, guidance=guidance), SCHEDULE, grid
                        )
                        for seed in (int(guidance), 2)
                    ]
                ).predict(img, step)
                for each in (denoiser, plain)
            )
            assert error(ours, wanted) <= 1e-6
    assert denoiser.graphed.captured == 1
