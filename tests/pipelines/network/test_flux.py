"""The engine's network is diffusers', forward by forward."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines import networks
from pipelines.networks import conditioning, diffusers_model, engine, error, noise, oracle, predict
from redux_pipelines.attention import backends
from redux_pipelines.attention.backends import IMPLEMENTATIONS
from redux_pipelines.attention.groups import Implementation
from redux_pipelines.errors import WeightsError
from redux_pipelines.network.flux import Flux, FluxParams
from redux_pipelines.network.onednn_operators import OneDnnOperators
from redux_pipelines.network.operators import KernelOperators, TorchOperators
from redux_pipelines.sampling import Grid

CASES = {
    "a prompt": {},
    "folded text": {"copies": 40},
    "two pictures": {"redux": (5, 9)},
    "no picture": {"redux": ()},
    "low guidance": {"guidance": 1.0},
}

ALL_OPERATORS = [TorchOperators(), KernelOperators(), OneDnnOperators()]


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@pytest.mark.parametrize("grid", [Grid(4, 6), Grid(1, 1), Grid(9, 5)], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_float32_forward_is_that_of_diffusers(model, ours, fields, grid, batch):
    given, img = conditioning(model, **fields), noise(model, grid, batch)
    assert error(predict(ours, given, grid, img), oracle(model, given, grid, img)) <= 1e-5


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@pytest.mark.parametrize("grid", [Grid(4, 6), Grid(1, 1), Grid(9, 5)], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("operators", [KernelOperators(), OneDnnOperators()], ids=lambda o: o.name)
def test_a_forward_on_other_operators_is_that_of_diffusers(model, operators, fields, grid, batch):
    """Kernels' references, on a CPU: what blocks hand to the kernels, and in which order."""
    fused = engine(model, operators=operators)
    given, img = conditioning(model, **fields), noise(model, grid, batch)
    assert error(predict(fused, given, grid, img), oracle(model, given, grid, img)) <= 1e-5


@pytest.mark.parametrize("operators", ALL_OPERATORS, ids=lambda o: o.name)
@pytest.mark.parametrize("layers", [(2, 3), (1, 0), (0, 2)], ids=str)
@torch.inference_mode()
def test_blocks_may_be_run_in_parts(operators, layers):
    model, grid = diffusers_model(num_layers=layers[0], num_single_layers=layers[1]), Grid(4, 6)
    flux_engine = engine(model, operators=operators)
    img, given = noise(model, grid), conditioning(model)
    prepared = flux_engine.prepare(given, networks.SCHEDULE, grid)
    flux, mod, context = prepared.flux, prepared.modulation[1], prepared.context
    for cut in range(1, flux.num_blocks):
        x = flux.embed(img, prepared.txt)
        x = flux.run(x, mod, context, 0, cut)
        assert x.shape[1] == context.txt_rows + grid.tokens
        out = flux.project_out(flux.run(x, mod, context, cut, flux.num_blocks), mod, context)
        assert error(out, prepared.predict(img, 1)) <= 1e-6


@pytest.mark.parametrize("step", [0, 1, 2])
def test_every_step_of_the_schedule_is_that_of_diffusers(model, ours, step):
    grid, given = Grid(4, 6), conditioning(model, copies=40)
    img = noise(model, grid)
    assert (
        error(predict(ours, given, grid, img, step), oracle(model, given, grid, img, step)) < 1e-5
    )


@pytest.fixture
def _double_rope(monkeypatch):
    """diffusers casts queries and keys to float32 for RoPE; here it rotates them in their dtype."""
    from diffusers.models.transformers import transformer_flux

    def rotate(x, table, sequence_dim):
        assert sequence_dim == 1
        cos, sin = (each[None, :, None] for each in table)
        pairs = x.unflatten(-1, (-1, 2))
        rotated = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return x * cos + rotated * sin

    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", rotate)


@pytest.mark.usefixtures("_double_rope")
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_float64_forward_is_that_of_diffusers_to_ten_digits(fields, guidance):
    model, grid = diffusers_model(torch.float64, guidance_embeds=guidance), Grid(4, 6)
    given, img = conditioning(model, **fields), noise(model, grid, batch=2)
    assert error(predict(engine(model), given, grid, img), oracle(model, given, grid, img)) <= 1e-10


@pytest.mark.parametrize("layers", [(1, 1), (3, 0), (0, 2)], ids=str)
def test_depths_may_differ(layers):
    model, grid = diffusers_model(num_layers=layers[0], num_single_layers=layers[1]), Grid(3, 3)
    given, img = conditioning(model), noise(model, grid)
    assert error(predict(engine(model), given, grid, img), oracle(model, given, grid, img)) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_is_as_close_to_float32_as_diffusers(model, dtype, bound):
    grid, given = Grid(4, 6), conditioning(model, copies=40)
    img = noise(model, grid)
    exact = oracle(model, given, grid, img)
    half = diffusers_model(dtype)
    rounded = replace(
        given,
        txt=replace(given.txt, values=given.txt.values.to(dtype)),
        redux=tuple(replace(each, values=each.values.to(dtype)) for each in given.redux),
        vec=given.vec.to(dtype),
    )
    ours = predict(engine(half), rounded, grid, img.to(dtype)).float()
    theirs = oracle(half, rounded, grid, img.to(dtype)).float()
    assert error(ours, exact) <= max(1.2 * error(theirs, exact), bound / 2)
    assert error(ours, theirs) <= bound


def test_float16_activations_beyond_its_range_are_clipped():
    model, grid = diffusers_model(torch.float16), Grid(3, 3)
    for block in model.transformer_blocks:
        block.ff_context.net[2].bias.fill_(60000.0)
    out = predict(engine(model), conditioning(model), grid, noise(model, grid))
    assert out.isfinite().all()


def test_folding_without_its_bias_is_wrong(model, ours):
    grid, given = Grid(4, 6), conditioning(model, copies=512)
    img = noise(model, grid)
    expected = oracle(model, given, grid, img)
    wrong = replace(given, txt=replace(given.txt, copies=1))
    assert error(predict(ours, given, grid, img), expected) <= 1e-5
    assert error(predict(ours, wrong, grid, img), expected) > 1e-2


def test_a_picture_of_strength_0_is_no_picture(model, ours):
    grid, given = Grid(4, 6), conditioning(model)
    img = noise(model, grid)
    off = replace(given, redux=tuple(replace(each, log_weight=-math.inf) for each in given.redux))
    without = replace(given, redux=())
    assert torch.equal(predict(ours, off, grid, img), predict(ours, without, grid, img))
    assert error(predict(ours, off, grid, img), oracle(model, off, grid, img)) <= 1e-5


@pytest.mark.parametrize("backend", ["engine", "diffusers"])
def test_a_picture_of_strength_2_is_the_picture_twice(model, ours, backend):
    """Against diffusers with the tokens written out twice, which needs no weight for that."""
    grid, given = Grid(4, 6), conditioning(model)
    img, (picture,) = noise(model, grid), given.redux
    twice = oracle(model, replace(given, redux=(picture, picture)), grid, img)
    strong = replace(given, redux=(replace(picture, log_weight=math.log(2)),))
    compute = partial(predict, ours) if backend == "engine" else partial(oracle, model)
    assert error(compute(strong, grid, img), twice) <= 1e-5
    assert error(compute(given, grid, img), twice) > 1e-3


def test_both_backends_agree_on_weights_that_no_copies_make(model, ours):
    grid, given = Grid(4, 6), conditioning(model, copies=9, redux=(5, 4, 3))
    img = noise(model, grid)
    weights = (math.log(0.3), 0.0, math.log(2.7))
    sets = tuple(
        replace(tokens, log_weight=weight)
        for tokens, weight in zip(given.redux, weights, strict=True)
    )
    given = replace(given, redux=sets)
    assert error(predict(ours, given, grid, img), oracle(model, given, grid, img)) <= 1e-5


@pytest.mark.parametrize("name", ["onednn", "biased", "flash-cpu"])
def test_rows_that_only_fill_up_change_nothing(model, ours, name):
    (attention,) = (each for each in IMPLEMENTATIONS if each.name == name)
    padded = engine(model, attention=replace(attention, row_multiple=16))
    grid, given = Grid(4, 6), conditioning(model, copies=40)
    img = noise(model, grid)
    prepared = padded.prepare(given, networks.SCHEDULE, grid)
    assert (prepared.context.txt_rows + grid.tokens) % 16 == 0
    assert error(predict(padded, given, grid, img), predict(ours, given, grid, img)) <= 1e-5


def test_folded_text_is_one_row(ours, model):
    given = conditioning(model, copies=512, redux=(5,))
    assert ours.prepare(given, networks.SCHEDULE, Grid(4, 6)).context.txt_rows == 6


def test_images_of_a_batch_do_not_mix(model, ours):
    grid, given = Grid(4, 6), conditioning(model)
    img = noise(model, grid, batch=3)
    together = predict(ours, given, grid, img)
    for index in range(3):
        alone = predict(ours, given, grid, img[index : index + 1])
        assert error(together[index : index + 1], alone) <= 1e-6


def test_predict_leaves_its_input_alone(model, ours):
    grid, given = Grid(4, 6), conditioning(model)
    img = noise(model, grid)
    before = img.clone()
    predict(ours, given, grid, img)
    assert torch.equal(img, before)


class _Watch(TorchDispatchMode):
    """Remembers dtype and shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        self.seen += [(str(func), each.dtype, tuple(each.shape)) for each in tensors]
        return out


TURNING = {"complex", "view_as_complex", "mul_"}
"""What rotates pairs: all that may know complex numbers. Compiled code has none."""


@pytest.mark.parametrize("operators", ALL_OPERATORS, ids=lambda o: o.name)
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@torch.inference_mode()
def test_a_step_uses_no_double_precision_and_no_mask(model, operators, fields, monkeypatch):
    monkeypatch.setattr(backends, "_KEYS", 64)  # of large blocks this would be one
    monkeypatch.setattr(backends, "FEW_KEYS", 64)
    grid, ours = Grid(19, 21), engine(model, operators=operators)  # more rows than a layer is wide
    img, given = noise(model, grid), conditioning(model, **fields)
    prepared = ours.prepare(given, networks.SCHEDULE, grid)
    with _Watch() as watch:
        prepared.predict(img, 1)
    assert len(watch.seen) > 100
    rows = prepared.context.txt_rows + grid.tokens
    for name, dtype, shape in watch.seen:
        assert dtype not in (torch.float64, torch.complex128), name
        assert dtype != torch.complex64 or name.split(".")[1] in TURNING, name
        assert sum(size >= grid.tokens for size in shape) < 2, f"{name}: {shape} of {rows} rows"


@pytest.mark.parametrize("copies", [1, 40])
def test_a_forward_by_blocks_of_keys_is_that_of_diffusers(model, copies, monkeypatch):
    """As networks of full size have it: several blocks of keys and of queries."""
    monkeypatch.setattr(backends, "FEW_KEYS", 0)
    monkeypatch.setattr(backends, "_KEYS", 24)
    monkeypatch.setattr(backends, "_QUERIES", 24)
    ours, grid = engine(model, operators=OneDnnOperators()), Grid(9, 5)
    given, img = conditioning(model, copies=copies), noise(model, grid, batch=2)
    assert error(predict(ours, given, grid, img), oracle(model, given, grid, img)) <= 1e-5


def test_attention_is_called_once_per_block(model):
    calls = []
    (biased,) = (each for each in IMPLEMENTATIONS if each.name == "biased")

    def spy(q, k, v, groups, into=None):
        calls.append((q.shape[2], k.shape[2], groups))
        return biased(q, k, v, groups, into)

    attention = Implementation("spy", spy, ("cpu",), (torch.float32,))
    grid, given = Grid(4, 6), conditioning(model, copies=8)
    predict(engine(model, attention=attention), given, grid, noise(model, grid))
    assert [call[:2] for call in calls] == [*4 * [(30, 30)], (24, 30)]  # last: image rows ask


FULL_SIZE = {
    "dev": ({"guidance_embeds": True}, 11_901_408_320),
    "schnell": ({"guidance_embeds": False}, 11_891_178_560),
}


@pytest.mark.parametrize(("config", "count"), FULL_SIZE.values(), ids=FULL_SIZE)
def test_full_size_has_the_known_number_of_parameters(config, count):
    with torch.device("meta"):
        flux = Flux(FluxParams(guidance_embed=config["guidance_embeds"]))
    assert sum(each.numel() for each in flux.parameters()) == count
    modulation = sum(each.numel() for each in flux.modulation.layers.parameters())
    assert modulation == 3_247_448_064


@pytest.mark.parametrize("change", [{"patch_size": 2}, {"axes_dims_rope": (16, 56, 58)}], ids=str)
def test_networks_that_are_not_flux_are_refused(change):
    with pytest.raises(WeightsError, match="axes that add up to attention_head_dim=16"):
        FluxParams.of({**networks.SMALL, **change})


@pytest.mark.slow
@pytest.mark.parametrize("operators", [TorchOperators(), OneDnnOperators()], ids=lambda o: o.name)
@pytest.mark.parametrize(
    ("grid", "tokens"),
    [
        (Grid(16, 24), {"copies": 512}),
        (Grid(16, 24), {"text": 64}),
        (Grid(64, 64), {"text": 512}),  # 5,337 rows: 1024 × 1024 pixels with an encoded prompt
    ],
    ids=str,
)
def test_one_block_of_each_kind_at_full_width(grid, tokens, operators):
    model = diffusers_model(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        axes_dims_rope=(16, 56, 56),
    )
    given, img = conditioning(model, redux=(729,), **tokens), noise(model, grid)
    ours = predict(engine(model, operators=operators), given, grid, img)
    assert error(ours, oracle(model, given, grid, img)) <= 1e-5
