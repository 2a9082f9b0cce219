"""Between loading and the first request: compiled, compared, kept; or left as it was, and said."""

import logging
import math

import pytest
import torch

from pipelines.fake_graphs import INPUTS, NOT_REPLAYING, Baking, FakeCapture, FakeReplay
from pipelines.networks import diffusers_model, engine
from redux_pipelines.compilation.compiled import compiled_graphs
from redux_pipelines.contract.types import CompilePlan
from redux_pipelines.denoising import warm_up as module
from redux_pipelines.denoising.diffusers_backend import DiffusersDenoiser
from redux_pipelines.denoising.quality import TIERS
from redux_pipelines.denoising.warm_up import compiled_mode, warm_up
from redux_pipelines.memory.plan import GraphLimits
from redux_pipelines.network.operators import KernelOperators
from redux_pipelines.sampling import Grid

GRIDS = (Grid(4, 6), Grid(5, 5))
PICTURE = 49  # rows


@pytest.fixture(autouse=True)
def _no_compiler_processes(monkeypatch, fresh_compiler):
    # Inductor, whose processes these are, is loaded by none of the backends here.
    monkeypatch.setattr(module, "_end_compiler_processes", lambda: None)


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    # What is computed at every size is quadratic in these rows.
    monkeypatch.setattr(module, "_REDUX_TOKENS", PICTURE)


@pytest.fixture(scope="module")
def model():
    """One block of each kind: each of them takes its time to trace."""
    return diffusers_model(num_layers=1, num_single_layers=1)


@pytest.fixture
def denoiser(model):
    """On the kernels' operators, which a compiler sees as one call each."""
    return engine(model, operators=KernelOperators())


BLOCKS = CompilePlan("blocks")
"""Where a plan's mode does not matter: the whole step, too, takes twice as long to trace."""


def test_it_compiles_compares_and_says_how_long_it_took(model):
    denoiser = engine(model)  # plain torch, as on a CPU
    report = warm_up(denoiser, BLOCKS, GRIDS, (1,), backend="eager")
    assert (report.mode, report.failures, report.graphs) == ("blocks", (), 2)
    assert list(report.seconds) == ["4x6 tokens, batch 1", "5x5 tokens, batch 1"]
    assert compiled_mode(denoiser) == "blocks"


def wrong(graph, inputs):
    return lambda *given: [1.001 * each for each in graph(*given)]


def crashing(graph, inputs):
    def run(*_):
        raise RuntimeError("illegal instruction")

    return run


def unable(graph, inputs):
    raise RuntimeError("no such compiler")


class FailingBackend:
    """Compiled code that fails in the way that ``failure`` names at the time of the call."""

    def __init__(self):
        self.failure = ""

    def __call__(self, graph, inputs):
        ways = {
            "wrong": wrong(graph, inputs),
            "not a number": lambda *given: [each * math.nan for each in graph(*given)],
            "zeros": lambda *given: [torch.zeros_like(each) for each in graph(*given)],
            "nothing but NaN": lambda *given: [
                torch.full_like(each, math.nan) for each in graph(*given)
            ],
            "crashing": crashing(graph, inputs),
        }
        return lambda *given: ways[self.failure](*given)


FAILURES = {
    "wrong": ", at most 1e-04 is allowed",
    "not a number": "is off by nan",
    "zeros": "is off by",
    "nothing but NaN": "is off by nan",
    "crashing": "illegal instruction",
}


def assert_taken_back(denoiser, backend, folder, reason):
    plan = CompilePlan("blocks", cache_dir=folder)
    report = warm_up(denoiser, plan, GRIDS, (1,), backend=backend)
    assert report.mode == "off"
    assert compiled_mode(denoiser) == "off"
    (failure,) = report.failures
    assert failure.startswith("not compiled: ")
    assert reason in failure
    assert not any({"forward", "forward_img"} & set(vars(each)) for each in denoiser.flux.modules())
    assert list(folder.iterdir()) == []  # nothing wrong is kept


def test_what_is_wrong_or_crashes_is_taken_back(denoiser, tmp_path, monkeypatch):
    """One backend for all of them, so that nothing is traced again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    backend = FailingBackend()
    for backend.failure, reason in FAILURES.items():
        assert_taken_back(denoiser, backend, tmp_path, reason)


def test_a_compiler_that_fails_leaves_all_as_it_was(denoiser, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    assert_taken_back(denoiser, unable, tmp_path, "no such compiler")


def test_where_what_was_kept_fails_it_is_compiled_anew(denoiser, tmp_path, monkeypatch, caplog):
    """The first start keeps code; then that is damaged."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    plan = CompilePlan("blocks", cache_dir=tmp_path)
    assert warm_up(denoiser, plan, GRIDS[:1], (1,), backend="eager").mode == "blocks"
    (folder,) = tmp_path.iterdir()
    (folder / "damaged").touch()

    def broken_while_kept(graph, inputs):
        return crashing(graph, inputs) if (folder / "damaged").exists() else graph

    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING):
        report = warm_up(denoiser, plan, GRIDS[:1], (1,), backend=broken_while_kept)
    assert (report.mode, report.failures) == ("blocks", ())
    assert "illegal instruction" in caplog.text
    assert "compiling anew, without what was kept" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["facts.json"]


def test_after_a_whole_steps_warm_up_a_step_cache_compiles_nothing_more(denoiser):
    report = warm_up(denoiser, CompilePlan("full"), GRIDS, (1, 2), backend="eager")
    assert (report.mode, report.failures, compiled_mode(denoiser)) == ("full", (), "full")
    graphs = compiled_graphs()
    # of one image and of several: the step, and both blocks, which a cut step needs by themselves
    assert report.graphs == graphs == 2 * (1 + 2)
    with torch.inference_mode():
        for grid in (GRIDS[0], Grid(6, 8), Grid(7, 3)):
            for batch in (1, 2, 3):
                run = module._prepared(denoiser, grid, batch).start(TIERS["fast"])
                run.predict(module._noise(denoiser, grid, batch), 0)
    assert compiled_graphs() == graphs


def test_wrong_blocks_are_found_where_the_whole_step_is_right(denoiser):
    """The first graph is the step's."""
    made = []

    def second_is_wrong(graph, inputs):
        made.append(graph)
        return graph if len(made) == 1 else wrong(graph, inputs)

    report = warm_up(denoiser, CompilePlan("full"), GRIDS, (1,), backend=second_is_wrong)
    assert report.mode == "off"
    assert "a compiled step with a step cache of 4x6 tokens is off by" in report.failures[0]
    assert not any("forward" in vars(block) for block in denoiser.flux.blocks)


def test_a_size_that_does_not_fit_is_passed_over(denoiser, monkeypatch, caplog):
    predict = module._predict

    def fit(denoiser, grid, img, trial):
        if grid.tokens > 24:
            raise torch.OutOfMemoryError("too large")
        return predict(denoiser, grid, img, trial)

    monkeypatch.setattr(module, "_predict", fit)
    with caplog.at_level(logging.WARNING):
        report = warm_up(denoiser, BLOCKS, GRIDS, (1,), backend="eager")
    assert (report.mode, report.failures) == ("blocks", ())
    assert "does not fit" in caplog.text


def test_nothing_planned_is_nothing_done(denoiser):
    report = warm_up(denoiser, CompilePlan("off"), GRIDS, (1,), backend=unable)
    assert (report.mode, report.cuda_graphs, report.failures) == ("off", 0, ())


def test_diffusers_own_network_is_refused(model):
    with pytest.raises(ValueError, match="'diffusers' cannot be compiled: use the backend 'engine"):
        warm_up(DiffusersDenoiser(model), CompilePlan("full"), GRIDS, (1,), backend="eager")


class SwitchedBackend:
    """Compiled code that is right until ``fixed`` names one of a step's inputs by its place.

    Then it goes on with the first value that this had, by shapes. ``repeats``: with the results.
    """

    def __init__(self):
        self.fixed = None
        self.repeats = False
        self.inputs = set()

    def __call__(self, graph, inputs):
        kept = {}

        def run(*given):
            given = list(given)
            own = [
                place
                for place, each in enumerate(given)
                if isinstance(each, torch.Tensor) and not isinstance(each, torch.nn.Parameter)
            ]
            self.inputs.update(range(len(own)))
            shapes = (self.fixed, *(given[place].shape for place in own))
            if self.fixed is not None and self.fixed < len(own):
                place = own[self.fixed]
                given[place] = kept.setdefault(shapes, given[place].clone())
            out = graph(*given)
            if self.repeats:
                out = kept.setdefault(shapes, [each.clone() for each in out])
                out = [each.clone() for each in out]
            return out

        return run


def test_compiled_code_that_repeats_itself_or_ignores_an_input_is_taken_back(denoiser):
    """One backend for all tries, so that nothing is traced again."""
    backend, plan = SwitchedBackend(), CompilePlan("full")
    assert warm_up(denoiser, plan, GRIDS[:1], (1,), backend=backend).failures == ()
    assert len(backend.inputs) >= 6  # noise, text, modulations, two of positions, groups of keys
    refused = {}
    for place in sorted(backend.inputs):
        backend.fixed = place
        report = warm_up(denoiser, plan, GRIDS[:1], (1,), backend=backend)
        refused[place] = (report.mode, len(report.failures))
    assert set(refused.values()) == {("off", 1)}
    backend.fixed, backend.repeats = None, True
    report = warm_up(denoiser, plan, GRIDS[:1], (1,), backend=backend)
    assert "is off by" in report.failures[0]


def test_compiled_code_is_tried_with_the_smallest_size_too(denoiser):
    backend, least = "eager", Grid(2, 3)
    report = warm_up(denoiser, BLOCKS, GRIDS[:1], (1,), backend=backend, least=least)
    assert [name for name in report.seconds if "2x3" in name] == ["2x3 tokens, batch 1"]
    report = warm_up(denoiser, BLOCKS, (least,), (1,), backend=backend, least=least)
    assert list(report.seconds) == ["2x3 tokens, batch 1"]


@pytest.mark.parametrize("mode", ["off", "blocks"])
def test_cuda_graphs_are_tried_before_they_are_used(denoiser, mode):
    capture = FakeCapture()
    plan = CompilePlan(mode, cuda_graphs=3)
    report = warm_up(denoiser, plan, GRIDS, (1,), backend="eager", capture=capture)
    assert (report.mode, report.cuda_graphs, report.failures) == (mode, 3, ())
    assert [each.replays for each in capture.made] == [2 + 2, 2 + 2]  # of two sizes
    assert denoiser.graphed.captured == 2


LIMITS = GraphLimits(shapes=2, rows=PICTURE + 100)
AUTO = CompilePlan("off", cuda_graphs="auto")


def test_by_default_there_are_as_many_as_the_memory_plan_has_room_for(denoiser):
    capture = FakeCapture()
    report = warm_up(denoiser, AUTO, (*GRIDS, Grid(12, 12)), (1,), capture=capture, limits=LIMITS)
    assert (report.cuda_graphs, report.failures) == (2, ())
    assert len(capture.made) == 2
    assert not denoiser.graphed.takes(torch.zeros(1, 144, 16), torch.zeros(1 + PICTURE, 48))


@pytest.mark.parametrize("limits", [None, GraphLimits(0, 800)], ids=["no plan", "no room"])
def test_by_default_what_has_no_room_is_not_spoken_of(denoiser, limits):
    report = warm_up(denoiser, AUTO, GRIDS, (1,), capture=FakeCapture(), limits=limits)
    assert (report.cuda_graphs, report.failures, denoiser.graphed) == (0, (), None)


def test_where_all_sizes_are_too_large_the_smallest_of_all_is_tried(denoiser):
    capture = FakeCapture()
    report = warm_up(
        denoiser, AUTO, (Grid(12, 12),), (1,), capture=capture, limits=LIMITS, least=Grid(4, 4)
    )
    assert (report.cuda_graphs, report.failures) == (2, ())
    assert list(report.seconds) == ["graph 4x4"]


@pytest.mark.parametrize(
    ("wanted", "shapes", "text"),
    [(1, 1, ()), (2, 2, ()), (5, 2, ("CUDA graphs of 2 shapes, not of 5",))],
)
def test_a_number_is_cut_to_what_has_room_and_that_is_said(denoiser, wanted, shapes, text):
    plan = CompilePlan("off", cuda_graphs=wanted)
    report = warm_up(denoiser, plan, GRIDS, (1,), capture=FakeCapture(), limits=LIMITS)
    assert report.cuda_graphs == shapes
    assert [each.partition(":")[0] for each in report.failures] == list(text)


def test_a_number_without_any_room_says_so(denoiser):
    plan, none = CompilePlan("off", cuda_graphs=2), GraphLimits(0, 800)
    report = warm_up(denoiser, plan, GRIDS, (1,), capture=FakeCapture(), limits=none)
    assert report.cuda_graphs == 0
    assert report.failures == ("no CUDA graphs: the memory plan has no room for them",)


def test_graphs_do_without_compiled_code_that_fails(denoiser):
    plan = CompilePlan("blocks", cuda_graphs=1)
    report = warm_up(denoiser, plan, GRIDS[:1], (1,), backend=unable, capture=FakeCapture())
    assert (report.mode, report.cuda_graphs) == ("off", 1)


class WrongReplay(FakeReplay):
    def replay(self):
        super().replay()
        self.output[..., 0] += 1e-6


GRAPH_FAILURES = {
    "wrong": (WrongReplay, "gives other numbers"),
    "unable": (FakeCapture(failures=9), "no step could be captured"),
} | {name: (replay, "gives other numbers") for name, replay in NOT_REPLAYING.items()}


@pytest.mark.parametrize("baked", INPUTS)
def test_cuda_graphs_that_ignore_an_input_are_not_used(denoiser, baked, monkeypatch):
    flux = denoiser.flux
    baking = Baking(flux.forward, baked)
    monkeypatch.setattr(flux, "forward", baking.step)
    plan = CompilePlan("off", cuda_graphs=3)
    report = warm_up(denoiser, plan, GRIDS, (1,), capture=baking.capture)
    assert (report.cuda_graphs, denoiser.graphed) == (0, None)
    assert "gives other numbers" in report.failures[0]


@pytest.mark.parametrize(("capture", "reason"), GRAPH_FAILURES.values(), ids=GRAPH_FAILURES)
def test_cuda_graphs_that_fail_are_not_used(denoiser, capture, reason):
    report = warm_up(denoiser, CompilePlan("off", cuda_graphs=3), GRIDS, (1,), capture=capture)
    assert report.cuda_graphs == 0
    assert reason in report.failures[0]
    assert denoiser.graphed is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="has what must be missing")
def test_without_a_gpu_cuda_graphs_are_refused_with_a_reason(denoiser):
    report = warm_up(denoiser, CompilePlan("off", cuda_graphs=1), GRIDS, (1,))
    assert report.cuda_graphs == 0
    assert report.failures[0].startswith("no CUDA graphs: ")


@pytest.mark.parametrize("plan", [CompilePlan("full"), CompilePlan("off", cuda_graphs=2)], ids=str)
def test_streamed_blocks_are_not_compiled_as_a_whole(denoiser, plan):
    denoiser.flux.blocks_ready = lambda index: None
    report = warm_up(denoiser, plan, GRIDS, (1,), backend="eager", capture=FakeCapture())
    assert (report.mode, report.cuda_graphs) == ("off", 0)
    assert "streamed from host memory" in report.failures[0]
    assert compiled_mode(denoiser) == "off"


def test_streamed_blocks_may_be_compiled_each(denoiser):
    """Nobody asked for CUDA graphs, so that none are missed."""
    ready = []
    denoiser.flux.blocks_ready = ready.append
    plan = CompilePlan("blocks", cuda_graphs="auto")
    report = warm_up(denoiser, plan, GRIDS[:1], (1,), backend="eager", limits=LIMITS)
    assert (report.mode, report.failures) == ("blocks", ())
    assert ready[:2] == [0, 1]
