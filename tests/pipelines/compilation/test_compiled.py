"""Compiled, the transformer is what it was: one graph for all sizes, prompts and strengths."""

import importlib
import logging
import math
import shutil
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from pipelines.networks import SCHEDULE, conditioning, diffusers_model, engine, error, noise
from redux_pipelines.attention.backends import IMPLEMENTATIONS
from redux_pipelines.compilation.compiled import (
    Compiled,
    _attend,
    _attend_into,
    _table,
    compiled_graphs,
    traceable,
)
from redux_pipelines.denoising.quality import TIERS, CachePolicy, Tier
from redux_pipelines.network import operators
from redux_pipelines.network.flux import DoubleBlock, Flux, SingleBlock
from redux_pipelines.network.layers import norm_rope_in_reals
from redux_pipelines.network.onednn_operators import OneDnnOperators
from redux_pipelines.network.operators import KernelOperators, TorchOperators
from redux_pipelines.sampling import Grid, Schedule

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SLOW_TORCH = pytest.param(TorchOperators, marks=pytest.mark.slow)
SLOW_ONEDNN = pytest.param(OneDnnOperators, marks=pytest.mark.slow)
GRIDS = [Grid(8, 8), Grid(8, 12), Grid(16, 16), Grid(24, 10), Grid(21, 12), Grid(14, 18)]
GRIDS += [Grid(24, 24)]
"""512² to 1536² of the random-weight model, whose rows and columns are 64 pixels."""

VARIANTS = [
    {},
    {"copies": 40},
    {"redux": (5, 9)},
    {"text": 3},
    {"strength": 2.0},
    {"strength": 0.5, "copies": 512},
    {"guidance": 1.0},
]

inductor = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
"""For tests that load Inductor, which still uses what torch deprecates."""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def given(model, strength=1.0, **fields):
    plain = conditioning(model, **fields)
    redux = tuple(replace(each, log_weight=math.log(strength)) for each in plain.redux)
    return replace(plain, redux=redux)


def computed_as_compiled():
    """Eager code turns pairs as complex numbers, compiled code as reals: here as reals, too."""
    return patch.object(operators, "norm_rope", norm_rope_in_reals)


def assert_same(denoiser, request, grid, img):
    """Two steps, as a pipeline makes them: the first noise comes from outside inference mode."""
    with torch.inference_mode():
        prepared = denoiser.prepare(request, SCHEDULE, grid)
        for step in (0, 2):
            given_img = img.clone()
            out = prepared.predict(img, step)
            with denoiser.compiled.paused(), computed_as_compiled():
                expected = prepared.predict(given_img, step)
            assert torch.equal(img, given_img)  # it is the caller's
            assert torch.equal(out, expected)
            img = out


def run_everything(denoiser, model, batch):
    """Every grid, and every variant at least once; of several images each variant."""
    more = VARIANTS[3:] + VARIANTS[:3] if batch == 1 else [None] * len(GRIDS)
    for grid, *variants in zip(GRIDS, VARIANTS, more, strict=True):
        for fields in filter(lambda each: each is not None, variants):
            assert_same(denoiser, given(model, **fields), grid, noise(model, grid, batch))


@pytest.mark.parametrize("operators", [SLOW_TORCH, KernelOperators, SLOW_ONEDNN])
def test_a_step_is_one_graph_for_everything_and_one_more_for_several_images(model, operators):
    denoiser = engine(model, operators=operators())
    counter = CompileCounterWithBackend("eager")
    denoiser.compiled = Compiled(denoiser.flux, "full", counter)
    run_everything(denoiser, model, batch=1)
    assert counter.frame_count == 1
    assert compiled_graphs() == 1
    for batch in (2, 4):
        run_everything(denoiser, model, batch)
    assert counter.frame_count == 2
    assert not counters["graph_break"]
    assert denoiser.compiled.failure is None


@pytest.mark.parametrize("operators", [SLOW_TORCH, KernelOperators, SLOW_ONEDNN])
def test_blocks_are_five_graphs_for_everything(operators):
    """Each kind with and without a pending addition (its first block has none), and the last."""
    model = diffusers_model(num_layers=3, num_single_layers=4)
    denoiser = engine(model, operators=operators())
    counter = CompileCounterWithBackend("eager")
    denoiser.compiled = Compiled(denoiser.flux, "blocks", counter)
    run_everything(denoiser, model, batch=1)
    assert counter.frame_count == 5
    for batch in (2, 3):
        run_everything(denoiser, model, batch)
    assert counter.frame_count == 10
    assert not counters["graph_break"]
    assert denoiser.compiled.failure is None


BATCH_GRIDS = [Grid(8, 8), Grid(8, 12), Grid(14, 18)]
BATCH_VARIANTS = [{}, {"copies": 40}, {"text": 3}]


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
    for grid, fields in zip(BATCH_GRIDS, BATCH_VARIANTS, strict=True):
        for batch in (2, 4):
            prepared = joined(denoiser, model, grid, batch, **fields)
            img = noise(model, grid, batch)
            out = prepared.predict(img, 1)
            with denoiser.compiled.paused():
                assert torch.equal(out, prepared.predict(img, 1))
    assert denoiser.compiled.failure is None
    assert not counters["graph_break"]
    assert counter.frame_count == graphs


@pytest.mark.parametrize(
    ("mode", "layers"),
    [("blocks", (2, 1)), pytest.param("full", (1, 1), marks=pytest.mark.slow)],
    ids=str,
)
def test_tracing_changes_in_place_gives_the_same(mode, layers):
    """``aot_eager`` turns changes in place into new tensors, as Inductor has it."""
    model = diffusers_model(num_layers=layers[0], num_single_layers=layers[1])
    denoiser = engine(model)
    denoiser.compiled = Compiled(denoiser.flux, mode, "aot_eager")
    for grid in GRIDS[:2]:
        assert_same(denoiser, given(model, copies=40), grid, noise(model, grid))


@pytest.mark.parametrize("layers", [(2, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("mode", ["blocks", "full"])
def test_depths_may_differ(mode, layers):
    model = diffusers_model(num_layers=layers[0], num_single_layers=layers[1])
    denoiser = engine(model, operators=KernelOperators())
    denoiser.compiled = Compiled(denoiser.flux, mode, "eager")
    assert_same(denoiser, given(model), GRIDS[0], noise(model, GRIDS[0]))
    assert denoiser.compiled.is_active


def test_requests_through_the_pipeline_share_a_graph(tiny, load, request_for, finish, difference):
    pipeline, plain = load(tiny), load(tiny)
    counter = CompileCounterWithBackend("eager")
    denoiser = pipeline._components.denoiser
    denoiser.compiled = Compiled(denoiser.flux, "full", counter)
    requests = [
        request_for(),
        request_for(width=768, height=576, prompt="a red cat"),
        request_for(num_images=2, num_inference_steps=3, guidance_scale=1.0),
        request_for(height=1024, empty_prompt="encode"),
    ]
    for request in requests:
        ours = finish(pipeline.generate(request))
        with computed_as_compiled():
            theirs = finish(plain.generate(request))
        assert all(difference(*pair) == 0 for pair in zip(ours.images, theirs.images, strict=True))
    assert counter.frame_count == 1
    assert "complex" not in counter.graphs[0].code  # the compiler could not fuse it
    assert pipeline.info.compiled == "full"
    assert plain.info.compiled == "off"


@pytest.mark.parametrize("operators", [SLOW_TORCH, KernelOperators, SLOW_ONEDNN])
@pytest.mark.parametrize("mode", ["blocks", "full"])
def test_a_step_cache_runs_compiled_blocks(model, mode, operators):
    """It stops after the first of two double blocks: neither has a pending addition.

    Computed steps and reused ones, for every size from the same four graphs; a whole step beside
    them is the one graph more that it always was, or a block's fifth kind.
    """
    denoiser, plain = (engine(model, operators=operators()) for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    denoiser.compiled = Compiled(denoiser.flux, mode, counter)
    schedule = Schedule((1.0, 0.8, 0.6, 0.4, 0.2, 0.0))
    tier = Tier(CachePolicy(math.inf, warm_up=2, max_hits=1))  # compute all but the fourth step
    with torch.inference_mode():
        for grid in GRIDS[::2]:
            runs = [
                each.prepare(given(model), schedule, grid).start(tier) for each in (denoiser, plain)
            ]
            for step in range(schedule.steps):
                img = noise(model, grid, seed=step)
                ours = runs[0].predict(img.clone(), step)
                with computed_as_compiled():
                    theirs = runs[1].predict(img.clone(), step)
                assert torch.equal(ours, theirs)
            assert [run.reused for run in runs] == [1, 1]
    assert counter.frame_count == 4
    for grid in GRIDS[:2]:
        assert_same(denoiser, given(model), grid, noise(model, grid))
    assert counter.frame_count == 5
    assert not counters["graph_break"]
    assert denoiser.compiled.is_active


def broken_backend(graph, inputs):
    raise RuntimeError("no such compiler\nwith details")


@pytest.fixture(scope="module")
def shallow():
    """For what the number of blocks does not matter to: each of them takes its time to trace."""
    return diffusers_model(num_layers=1, num_single_layers=1)


@pytest.mark.parametrize("mode", ["blocks", "full"])
def test_what_cannot_be_compiled_runs_as_before(request, mode, caplog):
    model = request.getfixturevalue({"blocks": "model", "full": "shallow"}[mode])
    denoiser = engine(model, operators=KernelOperators())
    denoiser.compiled = compiled = Compiled(denoiser.flux, mode, broken_backend)
    grid = GRIDS[0]
    img = noise(model, grid)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        out = denoiser.prepare(given(model), SCHEDULE, grid).predict(img, 0)
        same = engine(model, operators=KernelOperators())
        expected = same.prepare(given(model), SCHEDULE, grid).predict(img, 0)
    assert torch.equal(out, expected)
    assert "no such compiler" in compiled.failure
    assert "no such compiler" in caplog.text
    assert not compiled.is_active
    assert Flux.forward is type(denoiser.flux).forward
    for module in (denoiser.flux, *denoiser.flux.double_blocks, *denoiser.flux.single_blocks):
        assert not {"forward", "forward_img"} & set(vars(module))


def test_an_error_while_running_is_not_hidden(shallow):
    def out_of_memory(graph, inputs):
        def run(*_):
            raise torch.OutOfMemoryError("too large")

        return run

    denoiser = engine(shallow, operators=KernelOperators())
    denoiser.compiled = Compiled(denoiser.flux, "full", out_of_memory)
    prepared = denoiser.prepare(given(shallow), SCHEDULE, GRIDS[0])
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        prepared.predict(noise(shallow, GRIDS[0]), 0)
    assert denoiser.compiled.is_active


def test_only_the_kinds_of_blocks_are_compiled_by_blocks(model):
    denoiser = engine(model)
    compiled = Compiled(denoiser.flux, "blocks", "eager")
    assert "forward" not in vars(denoiser.flux)
    assert all("forward" in vars(block) for block in denoiser.flux.double_blocks)
    *singles, last = denoiser.flux.single_blocks
    assert all("forward" in vars(block) for block in singles)
    assert set(vars(last)) & {"forward", "forward_img"} == {"forward_img"}
    compiled.remove()
    assert compiled.failure is None
    assert isinstance(denoiser.flux.double_blocks[0], DoubleBlock)
    assert isinstance(last, SingleBlock)


def test_an_attention_of_the_same_name_is_refused(model):
    grid = GRIDS[0]
    prepared = engine(model).prepare(given(model), SCHEDULE, grid)
    (biased,) = (each for each in IMPLEMENTATIONS if each.name == "biased")
    traceable(prepared.context, biased)
    other = replace(biased, attend=lambda q, k, v, *_: v)
    with pytest.raises(ValueError, match="another attention is called 'biased'"):
        traceable(prepared.context, other)


@pytest.mark.parametrize("fields", [{}, {"copies": 8, "redux": (3, 2)}], ids=str)
def test_the_opaque_operator_keeps_its_promises(model, fields):
    prepared = engine(model).prepare(given(model, **fields), SCHEDULE, Grid(2, 3))
    (biased,) = (each for each in IMPLEMENTATIONS if each.name == "biased")
    context = traceable(prepared.context, biased)
    rows = context.txt_rows + 6
    q, k, v = torch.randn(3, 2, rows, 3, 16).transpose(2, 3).unbind(0)
    torch.library.opcheck(_attend, (q[:, :, 2:], k, v, _table(context.groups), "biased"))
    out = context.attention(q, k, v, context.groups)
    assert torch.equal(out, biased(q, k, v, context.groups))
    into = torch.zeros(2, rows, 3, 3, 16)[:, :, 1].transpose(1, 2)
    torch.library.opcheck(_attend_into, (q, k, v, _table(context.groups), "biased", into))
    assert context.attention(q, k, v, context.groups, into) is into
    assert torch.equal(into, out)


@inductor
@pytest.mark.parametrize("name", ["compile_fx", "fx_passes.fuse_attention"])
def test_advice_to_round_float32_on_a_gpu_fails_no_test(monkeypatch, name):
    """A GPU's only: without one it is made to believe in one."""
    module = importlib.import_module(f"torch._inductor.{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert torch.backends.cuda.matmul.fp32_precision != "tf32", "so our float32 is exact"
    module._warn_tf32_disabled.__wrapped__()
    with pytest.warns(UserWarning, match="TensorFloat32 tensor cores for float32 matrix"):
        module._warn_tf32_disabled.__wrapped__()


@inductor
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("operators", [TorchOperators, OneDnnOperators])
@pytest.mark.parametrize("mode", ["blocks", "full"])
def test_inductors_code_is_right_to_rounding_at_every_size(mode, operators):
    model = diffusers_model(num_layers=1, num_single_layers=2)
    denoiser = engine(model, operators=operators())
    denoiser.compiled = Compiled(denoiser.flux, mode)
    with torch.inference_mode():
        for grid, fields in product(GRIDS, VARIANTS):
            img = noise(model, grid)
            prepared = denoiser.prepare(given(model, **fields), SCHEDULE, grid)
            out = prepared.predict(img, 1)
            cut = prepared.start(TIERS["balanced"]).predict(img, 1)
            with denoiser.compiled.paused():
                expected = prepared.predict(img, 1)
            assert error(out, expected) <= 1e-6
            assert error(cut, expected) <= 1e-6
    assert denoiser.compiled.is_active
    assert compiled_graphs() == {"full": 1 + 3, "blocks": 3}[mode]  # one block of each kind


@inductor
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["blocks", "full"])
def test_compiled_step_on_a_gpu_is_the_step(mode):
    model = diffusers_model()
    denoiser = engine(model, device=torch.device("cuda"))
    denoiser.compiled = Compiled(denoiser.flux, mode)
    with torch.inference_mode():
        for grid, fields in product(GRIDS, VARIANTS):
            img, request = noise(model, grid), given(model, **fields)
            out = denoiser.prepare(request, SCHEDULE, grid).predict(img.cuda(), 1).cpu()
            reference = engine(model).prepare(request, SCHEDULE, grid)
            assert error(out, reference.predict(img, 1)) <= 1e-3
    assert denoiser.compiled.is_active
