"""What the formulas say is what is measured, within a tenth."""

import json
from pathlib import Path
from unittest.mock import patch

import bench_host
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SiglipVisionConfig, SiglipVisionModel, T5Config, T5EncoderModel

from fp8_products import needs_fp8
from live_bytes import LiveBytes
from pipelines.full_size import VAE
from pipelines.networks import (
    CPU,
    SCHEDULE,
    conditioning,
    diffusers_model,
    engine,
    noise,
)
from redux_pipelines import autoencoder
from redux_pipelines.attention.choice import candidates_for, choose
from redux_pipelines.attention.groups import Implementation, grouped
from redux_pipelines.autoencoder import Autoencoder
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.fp8.weights import Quantized
from redux_pipelines.loading.flux_weights import fp8_layers, load_flux
from redux_pipelines.memory import activations
from redux_pipelines.memory.activations import Demand, RowCounts
from redux_pipelines.memory.model_sizes import FLUX_DEV, EncoderSize, ModelSizes, TransformerSize
from redux_pipelines.network.flux import FluxParams
from redux_pipelines.network.operators import KernelOperators, TorchOperators
from redux_pipelines.sampling import Grid

DTYPES = [torch.float32, torch.bfloat16]
LAYERS = {"doubles": (1, 0), "singles": (0, 2), "the last alone": (0, 1), "both": (1, 2)}
SHAPES = {  # text rows, picture's rows, grid, batch
    "folded": (1, 180, Grid(32, 32), 1),
    "a prompt": (100, 180, Grid(20, 20), 1),
    "wide": (1, 700, Grid(32, 48), 1),
    "a batch": (30, 180, Grid(16, 24), 3),
}


def _measured(call):
    with torch.inference_mode(), LiveBytes() as memory:
        call()
    return memory.peak


def test_the_measure_counts_what_is_alive_at_once():
    def call():
        a = torch.ones(1000)
        b = a + 1  # two alive
        del a
        c = (b * 2)[:10]  # a view of 1000
        del b
        c.add_(1)
        return c + 1

    assert _measured(call) == 2 * 4000


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peak_of_a_forward_pass(dtype, layers):
    """In plain torch, as where a GPU's kernels are refused: no plan is made for a CPU."""
    (torchs,) = candidates_for("biased")
    model = diffusers_model(
        num_layers=layers[0],
        num_single_layers=layers[1],
        attention_head_dim=64,
        num_attention_heads=3,
        axes_dims_rope=(16, 24, 24),
    ).to(dtype)
    denoiser, size = engine(model, attention=torchs), TransformerSize.of(model.config)
    for text, redux, grid, batch in SHAPES.values():
        given_, img = conditioning(model, text=text, redux=(redux,)), noise(model, grid, batch)
        with torch.inference_mode():
            prepared = denoiser.prepare(given_, SCHEDULE, grid)
        peak = _measured(lambda prepared=prepared, img=img: prepared.predict(img, 1))
        rows = RowCounts(text + redux, grid.tokens, batch)
        assert activations.denoise_bytes(size, rows, dtype.itemsize) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("layers", [(0, 2), (1, 2)], ids=str)
@needs_fp8
def test_peak_of_a_forward_pass_in_fp8(layers):
    """With plain torch; the fused kernels of a GPU quantise without copies in float32."""
    model = diffusers_model(
        torch.bfloat16,
        num_layers=layers[0],
        num_single_layers=layers[1],
        attention_head_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    params, size = FluxParams.of(model.config), TransformerSize.of(model.config)
    tensors = Quantized(model.state_dict(), fp8_layers(params), CPU)
    flux = load_flux(params, tensors, device=CPU, dtype=torch.bfloat16)
    attention = choose(CPU, torch.bfloat16, params.head_dim).attention
    denoiser = EngineDenoiser(flux, attention, TorchOperators())
    for text, redux, grid, batch in SHAPES.values():
        given_, img = conditioning(model, text=text, redux=(redux,)), noise(model, grid, batch)
        with torch.inference_mode():
            prepared = denoiser.prepare(given_, SCHEDULE, grid)
        peak = _measured(lambda prepared=prepared, img=img: prepared.predict(img, 1))
        formula = activations.denoise_bytes(
            size, RowCounts(text + redux, grid.tokens, batch), 2, is_fp8=True
        )
        assert formula == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("layers", [(0, 2), (1, 2)], ids=str)
def test_a_forward_pass_in_fp8_on_the_kernels_takes_no_more(layers):
    """Where none runs, what they take is counted: with the memory that a run's products share."""
    model = diffusers_model(
        torch.bfloat16,
        num_layers=layers[0],
        num_single_layers=layers[1],
        attention_head_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    params, size = FluxParams.of(model.config), TransformerSize.of(model.config)
    tensors = Quantized(model.state_dict(), fp8_layers(params), CPU)
    flux = load_flux(params, tensors, device=CPU, dtype=torch.bfloat16)
    attention = Implementation("a", grouped(bench_host._attention), ("cpu",), (torch.bfloat16,))
    denoiser = EngineDenoiser(flux, attention, KernelOperators())
    for text, redux, grid, batch in SHAPES.values():
        given_, img = conditioning(model, text=text, redux=(redux,)), noise(model, grid, batch)
        with torch.inference_mode():
            prepared = denoiser.prepare(given_, SCHEDULE, grid)
        with bench_host.no_launches():
            peak = _measured(lambda prepared=prepared, img=img: prepared.predict(img, 1))
        formula = activations.denoise_bytes(
            size, RowCounts(text + redux, grid.tokens, batch), 2, is_fp8=True
        )
        assert 0.3 * formula < peak <= formula


def test_peak_of_a_modulation_table():
    model = diffusers_model(torch.bfloat16, attention_head_dim=64, axes_dims_rope=(16, 24, 24))
    size, modulation = TransformerSize.of(model.config), engine(model)._flux.modulation
    times, guidance = torch.linspace(0, 1000, 50).bfloat16(), torch.ones(1).bfloat16()
    vec = torch.ones(size.pooled_width).bfloat16()
    peak = _measured(lambda: modulation.table(times, guidance, vec))
    layer = 2 * size.modulation_layer  # is copied to a GPU, not to where it is
    assert activations.modulation_bytes(size, 50, 2) - layer == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "inner", "heads", "tokens"), [(64, 160, 4, 128),
                         (256, 640, 8, 64), (64, 160, 16, 256)])  # fmt: skip
def test_peak_of_t5(dtype, width, inner, heads, tokens):
    config = T5Config(
        vocab_size=128,
        d_model=width,
        d_kv=16,
        d_ff=inner,
        num_layers=2,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
    )
    model = T5EncoderModel(config).eval().to(dtype)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    peak = _measured(lambda: model(ids))
    size = EncoderSize(parameters=0, width=width, inner=inner, heads=heads, tokens=tokens)
    formula = activations.text_bytes(size, dtype.itemsize)
    attend = F.scaled_dot_product_attention
    with patch.object(F, "scaled_dot_product_attention", wraps=attend) as spy, torch.no_grad():
        model(ids)
    if spy.call_args.kwargs["attn_mask"].is_contiguous():
        assert formula == pytest.approx(peak, rel=0.1)
    else:  # transformers before 5.23 gives attention the biases as they lie, and needs no copy
        assert 0.9 * peak <= formula <= 1.7 * peak


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("redux_width", [64, 400])
def test_peak_of_a_picture(dtype, redux_width):
    config = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=128,
        patch_size=8,
    )
    siglip = SiglipVisionModel(config).eval().to(dtype)
    embedder = ReduxImageEncoder(redux_dim=96, txt_in_features=redux_width).eval().to(dtype)
    pixels = torch.zeros(1, 3, 128, 128, dtype=dtype)
    hidden = torch.zeros(1, 256, 96, dtype=dtype)
    peak = max(_measured(lambda: siglip(pixel_values=pixels)), _measured(lambda: embedder(hidden)))
    size = EncoderSize(parameters=0, width=96, inner=288, heads=4, tokens=256)
    formula = activations.vision_bytes(size, redux_width, dtype.itemsize)
    assert formula == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("channels", [(16, 32, 64, 64), (8, 16, 16, 32), (8, 8, 16, 32)])
@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "in strips"])
def test_peak_of_a_picture_decoded(is_whole, channels):
    config = {**VAE, "block_out_channels": channels, "norm_num_groups": 4, "latent_channels": 4}
    config |= {"scaling_factor": 0.36, "shift_factor": 0.1}
    vae = AutoencoderKL(**config).eval()
    side = 24 if is_whole else 80
    pixels = (8 * side) ** 2
    decoder = Autoencoder(vae, tile_above_pixels=pixels if is_whole else 0)
    peak = _measured(lambda: decoder.decode(torch.zeros(1, 4, side, side)))
    formula = activations.decode_bytes if is_whole else activations.strip_decode_bytes
    assert formula(ModelSizes(vae_channels=channels), pixels, 4) == pytest.approx(peak, rel=0.1)


def test_strips_are_those_of_the_autoencoder():
    assert activations.STRIP_PIXELS == autoencoder.STRIP_PIXELS


def test_peaks_of_full_size_blocks_are_those_of_fake_tensors():
    """``tests/codegen`` runs one block of each kind at 1024 x 1024 with a prompt.

    It runs them on kernels, which need a little less than the plain torch that plans assume.
    """
    path = Path(__file__).parents[2] / "codegen" / "codegen.json"
    golden = json.loads(path.read_text())["sizes"]
    rows = activations.rows_of(Demand(1024, 1024), 16)
    for kind, size in (
        ("double", TransformerSize(depth=1, depth_single=0)),
        ("single", TransformerSize(depth=0, depth_single=2)),
    ):
        formula = activations.denoise_bytes(size, rows, 2)
        assert 0.88 * formula <= golden[f"peak, {kind} block, ours"] <= 1.02 * formula


sides = st.integers(512, 1536)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 8), st.integers(1, 512), st.booleans())
def test_more_takes_no_less(width, height, batch, text, is_fp8):
    def all_bytes(demand):
        rows = activations.rows_of(demand, 16)
        denoise = activations.denoise_bytes(FLUX_DEV.transformer, rows, 2, is_fp8=is_fp8)
        whole = activations.decode_bytes(FLUX_DEV, demand.pixels, 2)
        strips = activations.strip_decode_bytes(FLUX_DEV, demand.pixels, 2)
        assert strips <= whole
        return denoise, whole, strips

    small = all_bytes(Demand(width, height, batch, text))
    for more in (
        Demand(width + 16, height, batch, text),
        Demand(width, height + 16, batch, text),
        Demand(width, height, batch + 1, text),
        Demand(width, height, batch, text + 16),
    ):
        assert all(a <= b for a, b in zip(small, all_bytes(more), strict=True))


@pytest.mark.parametrize("is_fp8", [False, True])
@given(rows=st.lists(st.integers(1, 5000), min_size=2, max_size=2), batch=st.integers(1, 8))
def test_a_graphs_pool_is_enough_however_rows_are_divided(is_fp8, rows, batch):
    text, image = rows
    size, total = FLUX_DEV.transformer, batch * sum(rows)
    pool = activations.graph_pool_bytes(size, total, 2, is_fp8=is_fp8)
    needed = activations.denoise_bytes(size, RowCounts(text, image, batch), 2, is_fp8=is_fp8)
    assert needed <= pool <= 1.2 * needed + 16 * 2**20


def test_a_graph_has_copies_of_what_a_step_reads_and_its_output():
    given_ = conditioning(model := diffusers_model())
    prepared = engine(model).prepare(given_, SCHEDULE, Grid(4, 6))
    tensors = (prepared.txt, prepared.modulation[0], *prepared.context.rope)
    img = noise(model, Grid(4, 6))
    own = sum(each.numel() * each.element_size() for each in (*tensors, img, img))
    size = TransformerSize.of(model.config)
    rows = img.shape[1] + len(prepared.txt)
    counted = activations.graph_bytes(size, rows, 1, 4) - activations.GRAPH_BYTES
    assert own <= counted <= 1.5 * own


def test_rows_of_a_full_size_request():
    rows = activations.rows_of(Demand(1024, 1024), 16)
    assert rows.image == 4096
    assert rows.total == 5344  # 512 + 729 + 4096 = 5337, filled up to a multiple of 16
    assert activations.rows_of(Demand(520, 512), 16).image == 33 * 32
