"""Which steps are replayed, with what, and what is forgotten; a stand-in plays the GPU's part."""

import gc
import logging
import math
from dataclasses import replace

import pytest
import torch

from pipelines.fake_graphs import (
    INPUTS,
    NOT_REPLAYING,
    Baking,
    FakeCapture,
    FakeDriver,
    FakeReplay,
    Frozen,
)
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
    assert replay.replays == 2 + 7  # to prove itself; the first step was not replayed


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


def _used(graphed, flux, model):
    """Two requests of one shape, each of two steps, as graphs and as they are."""
    for seed in (1, 2):
        given, img = prepared(model, seed=seed), noise(model, GRID, seed=seed)
        for step in (0, 1):
            out = step_of(graphed, given, img, step)
            yield out, flux(img.clone(), given.txt, given.modulation[step], given.context)


@pytest.mark.parametrize("replay", NOT_REPLAYING.values(), ids=NOT_REPLAYING)
@torch.inference_mode()
def test_a_graph_that_does_not_compute_is_never_used(model, replay, caplog):
    flux, made = engine(model).flux, []

    def capture(run):
        made.append(replay(run))
        return made[-1]

    graphed = GraphedStep(flux, capture, 2)
    assert all(torch.equal(out, want) for out, want in _used(graphed, flux, model))
    assert graphed.failure == "a replayed step gives other numbers"
    assert (graphed.captured, [each.is_reset for each in made]) == (0, [True])
    assert caplog.text.count("no CUDA graphs any more") == 1


@pytest.mark.parametrize("baked", INPUTS)
@torch.inference_mode()
def test_a_graph_that_does_not_read_an_input_is_never_used(model, baked):
    flux = engine(model).flux
    baking = Baking(flux, baked)
    graphed = GraphedStep(baking.step, baking.capture, 2)
    assert all(torch.equal(out, want) for out, want in _used(graphed, flux, model))
    assert graphed.failure == "a replayed step gives other numbers"


@torch.inference_mode()
def test_every_new_shape_proves_itself(model):
    """The first shape's graph is right, the next one's is empty: then none is believed."""
    flux, kinds = engine(model).flux, [FakeReplay, Frozen]
    graphed = GraphedStep(flux, lambda run: kinds.pop(0)(run), 4)
    for grid in (GRID, Grid(5, 5), GRID, Grid(3, 3)):
        given, img = prepared(model, grid), noise(model, grid)
        for step in (0, 1):
            want = flux(img.clone(), given.txt, given.modulation[step], given.context)
            assert torch.equal(step_of(graphed, given, img, step), want)
    assert graphed.failure is not None
    assert graphed.captured == 0
    assert kinds == []  # nothing was captured after the empty one


@torch.inference_mode()
def test_shapes_of_more_rows_run_as_they_are(model):
    """Rows of text, here 12, count as well as those of images, and of all images."""
    capture = FakeCapture()
    graphed = GraphedStep(engine(model).flux, capture, 4, max_rows=36)
    for grid, batch, captured in ((GRID, 1, 1), (Grid(5, 5), 1, 1), (Grid(2, 3), 2, 2)):
        given, img = prepared(model, grid), noise(model, grid, batch)
        for _ in range(2):
            step_of(graphed, given, img)
        assert len(capture.made) == captured


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("invalid"), torch.OutOfMemoryError("full"), TypeError("no stream")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("runs", [0, 1, 2])
@torch.inference_mode()
def test_whatever_a_capture_raises_the_step_runs(model, error, runs):
    """Before the capture, in the middle of the step, or when it is replayed to prove itself."""
    flux = engine(model).flux
    made = []

    class Raising(FakeReplay):
        def replay(self):
            raise error

    def capture(run):
        if runs < 2:
            if runs:
                run()
            raise error
        made.append(Raising(run))
        return made[-1]

    graphed = GraphedStep(flux, capture, 2)
    assert all(torch.equal(out, want) for out, want in _used(graphed, flux, model))
    assert (graphed.captured, graphed.failure) == (0, None)
    assert all(each.is_reset for each in made)


@pytest.fixture
def driver(monkeypatch):
    return FakeDriver(monkeypatch)


def computing(driver, place):
    """A computation in whose middle, once captured, something happens that no capture survives."""

    def run():
        if driver.recording and driver.fails_at == place == "run":
            driver.is_spoilt = True
            driver.fail("run")
        return torch.ones(2)

    return run


@pytest.mark.parametrize("place", ["begin", "run", "end", "instantiate"])
def test_a_failed_capture_leaves_stream_and_allocator_as_they_were(driver, place):
    capture = CudaCapture(torch.device("cuda", 0))
    before = capture(computing(driver, place))
    driver.fails_at = place
    with pytest.raises(torch.AcceleratorError):
        capture(computing(driver, place))
    assert driver.current is driver.main
    assert driver.recording == set()
    assert gc.isenabled()
    assert sum(driver.used.values()) == 1  # only what the graph before holds
    before.replay()
    after = capture(computing(driver, place))
    after.reset()
    before.reset()
    assert sum(driver.used.values()) == 0


def test_a_pool_whose_last_graph_is_gone_is_not_used_again(driver):
    capture = CudaCapture(torch.device("cuda", 0))
    for _ in range(2):
        first, second = (capture(computing(driver, None)) for _ in range(2))
        first.reset()
        third = capture(computing(driver, None))
        second.reset()
        third.reset()
        assert sum(driver.used.values()) == 0


def test_graphs_share_their_memory_while_there_is_one(driver):
    capture = CudaCapture(torch.device("cuda", 0))
    graphs = [capture(computing(driver, None)) for _ in range(3)]
    assert [count for count in driver.used.values() if count] == [3]
    for each in graphs:
        each.reset()


def test_side_and_current_stream_wait_for_each_other(driver):
    seen = []
    CudaCapture(torch.device("cuda", 0))(lambda: seen.append(driver.current.waits) or torch.ones(1))
    assert seen[0] == ["main"]
    assert driver.main.waits == ["side"]


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
    graphed = GraphedStep(denoiser.flux, CudaCapture(torch.device("cuda")), 2)
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["python", "invalid"])
@torch.inference_mode()
def test_after_a_failed_capture_a_gpu_goes_on(kind):
    """An exception in the middle, or a synchronisation, which spoils what is captured."""
    capture, x = CudaCapture(torch.device("cuda")), torch.ones(64, device="cuda")

    def failing():
        y = x + 1
        if torch.cuda.is_current_stream_capturing():
            if kind == "python":
                raise RuntimeError("in the middle")
            y.sum().item()
        return y

    before = capture(lambda: x * 3)
    stream, free = torch.cuda.current_stream(), torch.cuda.memory_allocated()
    for _ in range(3):
        with pytest.raises(RuntimeError):
            capture(failing)
        assert torch.cuda.current_stream() == stream
        assert torch.cuda.memory_allocated() == free
    before.replay()
    assert torch.equal(before.output, torch.full_like(x, 3))
    after = capture(lambda: x * 5)
    after.replay()
    assert torch.equal(after.output, torch.full_like(x, 5))
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.inference_mode()
def test_after_a_failed_capture_a_gpu_runs_the_step_and_captures_the_next():
    model = diffusers_model()
    denoiser = engine(model, device=torch.device("cuda"))
    own, failures = CudaCapture(torch.device("cuda")), [True]

    def capture(run):
        def failing():
            if failures and torch.cuda.is_current_stream_capturing():
                failures.pop()
                torch.cuda.synchronize()
            return run()

        return own(failing)

    graphed = GraphedStep(denoiser.flux, capture, 2)
    for grid, captured in ((Grid(4, 6), 0), (Grid(5, 5), 1)):
        ready = denoiser.prepare(conditioning(model), SCHEDULE, grid)
        for step in (0, 1, 2):
            img = noise(model, grid, seed=step).cuda()
            assert torch.equal(step_of(graphed, ready, img, step), ready.predict(img, step))
        assert (graphed.captured, graphed.failure) == (captured, None)


# --- which shapes are worth a graph ---------------------------------------------------------------


@torch.inference_mode()
def test_a_shape_is_captured_when_a_second_request_has_it(model):
    capture, flux = FakeCapture(), engine(model).flux
    graphed = GraphedStep(flux, capture, 2)
    graphed.waits = True
    for seed, made in ((1, 0), (2, 1), (3, 1)):
        given, img = prepared(model, seed=seed), noise(model, GRID, seed=seed)
        for step in (0, 1):
            out = step_of(graphed, given, img, step)
            want = flux(img.clone(), given.txt, given.modulation[step], given.context)
            assert torch.equal(out, want)
            assert len(capture.made) == made


@torch.inference_mode()
def test_shapes_that_come_once_take_no_graph_from_those_that_come_again():
    """Of one block each: a hundred steps are taken."""
    model = diffusers_model(num_layers=1, num_single_layers=1)
    capture, flux = FakeCapture(), engine(model).flux
    graphed = GraphedStep(flux, capture, 1)
    given, img = prepared(model), noise(model, GRID)
    step_of(graphed, given, img)
    graphed.waits = True
    for number in range(100):
        rare = replace(given.context.groups[-1], bias=-0.01 * (1 + number))
        groups = (*given.context.groups[:-1], rare)
        step_of(graphed, replace(given, context=replace(given.context, groups=groups)), img)
    assert len(capture.made) == 1
    assert not capture.made[0].is_reset
    assert len(graphed._plain) <= 64


@torch.inference_mode()
def test_a_step_that_is_not_a_number_says_nothing_against_graphs(model):
    capture, flux = FakeCapture(), engine(model).flux
    graphed, given = GraphedStep(flux, capture, 2), prepared(model)
    img = noise(model, GRID)
    assert step_of(graphed, given, img * math.nan).isnan().any()
    assert (graphed.failure, capture.made) == (None, [])
    step_of(graphed, given, img)
    assert graphed.captured == 1


@torch.inference_mode()
def test_a_shape_that_cannot_be_captured_takes_no_graphs_place(model):
    capture, flux = FakeCapture(), engine(model).flux
    graphed = GraphedStep(flux, capture, 2)
    for grid, failures in ((GRID, 0), (Grid(6, 6), 1), (Grid(4, 8), 0)):
        capture.failures = failures
        step_of(graphed, prepared(model, grid), noise(model, grid))
    assert graphed.captured == 2
    assert not any(each.is_reset for each in capture.made)
