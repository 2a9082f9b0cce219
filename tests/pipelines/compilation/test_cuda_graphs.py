"""Which steps are replayed, with what, and what is forgotten; a stand-in plays the GPU's part."""

import logging
from dataclasses import replace

import pytest
import torch

from pipelines.fake_graphs import FakeCapture
from pipelines.networks import SCHEDULE, conditioning, diffusers_model, engine, error, noise
from redux_pipelines.compilation.cuda_graphs import CudaCapture, GraphedStep
from redux_pipelines.sampling import Grid

GRID = Grid(4, 6)


def prepared(model, grid=GRID, **fields):
    return engine(model).prepare(conditioning(model, **fields), SCHEDULE, grid)


def step_of(graphed, given, img, step=0):
    return graphed(img, given.txt, given.modulation[step], given.context)


@torch.inference_mode()
def test_replayed_steps_are_the_steps(model):
    """Other noise, step, prompt and positions reach the graph of the same shape."""
    capture = FakeCapture()
    flux = engine(model).flux
    graphed = GraphedStep(flux, capture, 2)
    for grid in (Grid(4, 6), Grid(6, 4)):  # as many rows, at other places
        for seed in (1, 2):
            given = prepared(model, grid, seed=seed)
            for step in (0, 1):
                img = noise(model, grid, seed=seed)
                out = step_of(graphed, given, img, step)
                plain = flux(img.clone(), given.txt, given.modulation[step], given.context)
                assert torch.equal(out, plain)
    (replay,) = capture.made
    assert replay.replays == 8


@torch.inference_mode()
def test_a_result_outlives_the_next_replay(model):
    graphed, given = GraphedStep(engine(model).flux, FakeCapture(), 1), prepared(model)
    first = step_of(graphed, given, noise(model, Grid(4, 6), seed=3))
    before = first.clone()
    step_of(graphed, given, noise(model, Grid(4, 6), seed=4))
    assert torch.equal(first, before)


OTHERS = {
    "more images": {"batch": 2},
    "another size": {"grid": Grid(5, 5)},
    "more text": {"text": 8},
    "another weight of the text": {"copies": 9},
}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
@torch.inference_mode()
def test_what_a_graph_cannot_be_told_is_another_graph(model, fields):
    capture = FakeCapture()
    flux = engine(model).flux
    graphed = GraphedStep(flux, capture, 2)
    first = prepared(model, **({"copies": 8} if "copies" in fields else {}))
    step_of(graphed, first, noise(model, Grid(4, 6)))
    batch, grid = fields.get("batch", 1), fields.get("grid", Grid(4, 6))
    rest = {name: value for name, value in fields.items() if name not in ("batch", "grid")}
    other, img = prepared(model, grid, **rest), noise(model, grid, batch)
    out = step_of(graphed, other, img)
    assert len(capture.made) == 2
    assert torch.equal(out, flux(img.clone(), other.txt, other.modulation[0], other.context))


@torch.inference_mode()
def test_the_shape_used_longest_ago_is_forgotten_and_its_memory_freed(model):
    capture = FakeCapture()
    graphed = GraphedStep(engine(model).flux, capture, 2)
    small, middle, large = ((prepared(model, Grid(n, n)), Grid(n, n)) for n in (2, 3, 4))
    for given, grid in (small, middle, small, large, small):
        step_of(graphed, given, noise(model, grid))
    assert [each.is_reset for each in capture.made] == [False, True, False]
    assert graphed.captured == 2
    step_of(graphed, middle[0], noise(model, middle[1]))
    assert len(capture.made) == 4
    graphed.clear()
    assert all(each.is_reset for each in capture.made)
    assert graphed.captured == 0


@torch.inference_mode()
def test_a_step_that_cannot_be_captured_runs_as_before(model, caplog):
    capture = FakeCapture(failures=1)
    flux = engine(model).flux
    graphed, given, img = GraphedStep(flux, capture, 2), prepared(model), noise(model, Grid(4, 6))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # and is not tried again at every step
            out = step_of(graphed, given, img)
            assert torch.equal(
                out, flux(img.clone(), given.txt, given.modulation[0], given.context)
            )
    assert capture.made == []
    assert caplog.text.count("not permitted when stream is capturing") == 1


@torch.inference_mode()
def test_inputs_are_left_alone(model):
    graphed, given = GraphedStep(engine(model).flux, FakeCapture(), 1), prepared(model)
    img = noise(model, Grid(4, 6))
    kept = [each.clone() for each in (img, given.txt, given.modulation, *given.context.rope)]
    step_of(graphed, given, img)
    for before, now in zip(
        kept, (img, given.txt, given.modulation, *given.context.rope), strict=True
    ):
        assert torch.equal(before, now)


@torch.inference_mode()
def test_a_graph_of_a_batch_is_replayed_with_other_requests(model):
    denoiser, plain = engine(model), engine(model)
    denoiser.graphed = GraphedStep(denoiser.flux, FakeCapture(), 2)
    grid = Grid(8, 8)
    img = noise(model, grid, 2)
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


def test_no_graphs_at_all_is_not_a_number_of_graphs(model):
    with pytest.raises(ValueError, match="must be at least 1"):
        GraphedStep(engine(model).flux, FakeCapture(), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.inference_mode()
def test_graphs_on_a_gpu_are_bitwise_the_step():
    model = diffusers_model()
    denoiser = engine(model, device=torch.device("cuda"))
    graphed = GraphedStep(denoiser.flux, CudaCapture(), 2)
    for grid in (Grid(4, 6), Grid(6, 4), Grid(9, 5), Grid(4, 6), Grid(8, 8), Grid(9, 5)):
        for copies in (1, 40):
            given = conditioning(model, copies=copies)
            ready = denoiser.prepare(given, SCHEDULE, grid)
            for step in (0, 1, 2):
                img = noise(model, grid, seed=step).cuda()
                expected = ready.predict(img.clone(), step)
                out = step_of(graphed, replace(ready), img, step)
                assert torch.equal(out, expected)
    assert graphed.captured == 2
