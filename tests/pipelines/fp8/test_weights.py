"""Checkpoints in fp8: quantised and widened tensor by tensor, and built without a second copy."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8_products import needs_fp8
from pipelines.networks import CPU, SMALL, conditioning, error, noise, predict
from redux_kernels.reference import quantize_rows
from redux_pipelines.attention.choice import choose
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.errors import WeightsError
from redux_pipelines.fp8 import weights
from redux_pipelines.fp8.linear import E4M3, Fp8Linear
from redux_pipelines.fp8.weights import Dequantized, Quantized, is_fp8
from redux_pipelines.loading.flux_weights import fp8_layers, key_map, load_flux
from redux_pipelines.network.flux import Flux, FluxParams
from redux_pipelines.network.operators import TorchOperators
from redux_pipelines.sampling import Grid

PARAMS = FluxParams.of(SMALL)
LAYERS = fp8_layers(PARAMS)


@pytest.fixture(scope="module")
def tensors(model):
    return model.state_dict()


def quantized(tensors):
    return Quantized(tensors, LAYERS, CPU)


def load(tensors, dtype=torch.float32):
    return load_flux(PARAMS, tensors, device=CPU, dtype=dtype)


def denoiser(tensors):
    attention = choose(CPU, torch.float32, PARAMS.head_dim).attention
    return EngineDenoiser(load(tensors), attention, TorchOperators())


def test_large_layers_of_blocks_are_quantised_and_nothing_else(tensors):
    flux = load(quantized(tensors))
    found = {name for name, each in flux.named_modules() if isinstance(each, Fp8Linear)}
    streams = [f"double_blocks.{i}.{stream}" for i in range(2) for stream in ("img", "txt")]
    assert found == {
        f"{stream}.{layer}" for stream in streams for layer in ("qkv", "proj", "mlp_in", "mlp_out")
    } | {f"single_blocks.{i}.{layer}" for i in range(3) for layer in ("linear1", "linear2")}


def test_full_size_layers_in_fp8_are_72_percent_of_the_weights():
    with torch.device("meta"):
        flux = Flux(FluxParams())
    shapes = dict(flux.named_parameters())
    sources = {name: set(keys) for name, keys in key_map(flux).items() if name.endswith("weight")}
    chosen = {f"{each}.weight" for each in fp8_layers(FluxParams())}
    count = sum(shapes[name].numel() for name, keys in sources.items() if keys & chosen)
    assert all(keys <= chosen for keys in sources.values() if keys & chosen)
    assert count == 12 * 3072**2 * (2 * 19 + 38)  # engine: 4.304 B each kind


def test_joined_layers_are_quantised_row_by_row(tensors):
    """A row's scale does not depend on what the row was joined with."""
    exact, flux = load(tensors), load(quantized(tensors))
    for name, each in flux.named_modules():
        if isinstance(each, Fp8Linear):
            q, scale = quantize_rows(exact.get_parameter(f"{name}.weight"))
            assert torch.equal(each.weight.float(), q.float()), name
            assert torch.equal(each.weight_scale, scale), name
            assert each.weight.is_contiguous(), name  # rows together, as the product takes them
            assert torch.equal(each.bias, exact.get_parameter(f"{name}.bias")), name


def test_files_in_fp8_and_quantising_while_loading_give_the_same_network(tensors):
    view = quantized(tensors)
    files = {key: view[key] for key in view}
    assert len(files) == len(view) == len(tensors) + len(LAYERS)
    one, two = load(files, torch.bfloat16), load(quantized(tensors), torch.bfloat16)
    assert dict(one.named_parameters()).keys() == dict(two.named_parameters()).keys()
    for name, each in one.named_parameters():
        assert torch.equal(each.float(), two.get_parameter(name).float()), name


def test_scales_are_float32_and_biases_are_the_models(tensors):
    flux = load(quantized(tensors), torch.bfloat16)
    kinds = {name.rpartition(".")[2]: set() for name, _ in flux.named_parameters()}
    for name, each in flux.named_parameters():
        kinds[name.rpartition(".")[2]].add(each.dtype)
    assert kinds == {
        "columns": {E4M3}, "column_scale": {torch.float32}, "weight": {torch.bfloat16},
        "bias": {torch.bfloat16}, "qk_norm": {torch.bfloat16},
    }  # fmt: skip


def test_parts_do_not_change_the_numbers(tensors, monkeypatch):
    key = "single_transformer_blocks.0.proj_mlp.weight"
    whole = quantize_rows(tensors[key])
    monkeypatch.setattr(weights, "_PART_ELEMENTS", 7 * tensors[key].shape[1])
    weight, scale = weights.quantize_weight(tensors[key], CPU)
    assert torch.equal(weight.float(), whole[0].float())
    assert torch.equal(scale, whole[1])


def test_a_scale_may_be_asked_for_first_and_twice(tensors):
    view, key = quantized(tensors), "transformer_blocks.1.attn.to_k"
    expected = quantize_rows(tensors[f"{key}.weight"])[1]
    assert torch.equal(view[f"{key}.weight_scale"], expected)
    assert torch.equal(view[f"{key}.weight_scale"], expected)
    assert "proj_out.weight_scale" not in view


def test_widened_weights_are_the_nearest_to_the_products(tensors):
    view = quantized(tensors)
    files = {key: view[key] for key in view}
    wide = Dequantized(files, torch.bfloat16)
    assert set(wide) == set(tensors)
    assert len(wide) == len(tensors)
    key = "transformer_blocks.0.ff.net.2"
    product = files[f"{key}.weight"].double() * files[f"{key}.weight_scale"].double()
    assert torch.equal(wide[f"{key}.weight"], product.float().bfloat16())
    assert wide["x_embedder.weight"] is tensors["x_embedder.weight"]
    with pytest.raises(KeyError):
        wide[f"{key}.weight_scale"]


@pytest.mark.parametrize("batch", [1, 3])
@needs_fp8
def test_a_forward_is_near_float32(model, tensors, batch):
    """Measured: .034; with weights alone in e4m3 .026."""
    grid, given = Grid(4, 6), conditioning(model, copies=40)
    img = noise(model, grid, batch)
    exact = predict(denoiser(tensors), given, grid, img)
    assert 0.005 < error(predict(denoiser(quantized(tensors)), given, grid, img), exact) <= 0.055


@needs_fp8
def test_weights_alone_cost_less_than_weights_and_inputs(model, tensors):
    grid, given = Grid(4, 6), conditioning(model, copies=40)
    img, view = noise(model, grid), quantized(tensors)
    exact = predict(denoiser(tensors), given, grid, img)
    wide = Dequantized({key: view[key] for key in view}, torch.float32)
    alone = error(predict(denoiser(wide), given, grid, img), exact)
    both = error(predict(denoiser(quantized(tensors)), given, grid, img), exact)
    assert 0.005 < alone < both


class Ledger(TorchDispatchMode):
    """Counts bytes that live in tensors which were made under it or handed to ``count``."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = set()
        self.shapes = set()

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" or storage.data_ptr() in self._known:
            return
        address, size = storage.data_ptr(), storage.nbytes()
        self._known.add(address)
        self.shapes.add((tuple(tensor.shape), tensor.dtype))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, address, size)

    def _release(self, address, size):
        self._known.discard(address)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.count(each)
        return out


class Files(dict):
    """Hands out copies, as reading a file does, and enters them in the ledger."""

    def __init__(self, tensors, ledger):
        super().__init__(tensors)
        self._ledger = ledger

    def __getitem__(self, key):
        tensor = super().__getitem__(key).clone()
        self._ledger.count(tensor)
        return tensor


def measure(source, view=lambda files: files):
    """The network, and how many bytes more than its own lived while it was built."""
    with Ledger() as ledger:
        flux = load(view(Files(source, ledger)), torch.bfloat16)
    own = sum(each.nbytes for each in flux.parameters())
    assert ledger.peak >= own
    return ledger, ledger.peak - own


def test_loading_files_in_fp8_holds_one_tensor_more_than_the_network(tensors):
    half = {key: each.bfloat16() for key, each in tensors.items()}
    view = quantized(half)
    files = {key: view[key] for key in view}
    ledger, extra = measure(files)
    largest = max(each.nbytes for each in files.values())
    assert extra <= largest
    wide = {tuple(files[f"{name}.weight"].shape) for name in LAYERS}
    kept = {tuple(each.shape) for key, each in half.items() if key.rpartition(".")[0] not in LAYERS}
    assert not {(shape, torch.bfloat16) for shape in wide - kept} & ledger.shapes


def test_quantising_while_loading_holds_one_tensor_and_its_e4m3_more(tensors, monkeypatch):
    half = {key: each.bfloat16() for key, each in tensors.items()}
    monkeypatch.setattr(weights, "_PART_ELEMENTS", 1024)
    _, extra = measure(half, quantized)
    largest = max(each.nbytes for each in half.values())
    scales = 4 * sum(len(half[f"{name}.weight"]) for name in LAYERS)
    parts = 8 * 4 * max(1024, max(each.shape[-1] for each in half.values()))
    assert extra <= 1.5 * largest + scales + parts


def test_the_ledger_sees_a_second_copy(tensors):
    files = {key: each.bfloat16() for key, each in tensors.items()}
    kept = []

    def hoard(source):
        for key in source:
            kept.append(source[key])
        return source

    _, extra = measure(files, hoard)
    assert extra > 5 * max(each.nbytes for each in files.values())


def test_a_lost_scale_is_named(tensors):
    view = quantized(tensors)
    files = {key: view[key] for key in view}
    del files["transformer_blocks.0.attn.to_k.weight_scale"]
    with pytest.raises(WeightsError, match=r"lacks transformer_blocks\.0\..*to_k\.weight_scale$"):
        load(files)


def test_a_scale_of_a_weight_that_is_not_e4m3_is_refused(tensors):
    view, key = quantized(tensors), "single_transformer_blocks.2.proj_out"
    files = {name: view[name] for name in view}
    files[f"{key}.weight"] = tensors[f"{key}.weight"]
    with pytest.raises(WeightsError, match=r"2\.proj_out\.weight has a scale, but it is .*float32"):
        load(files)


def test_a_scale_where_none_belongs_is_refused(tensors):
    extra = {**tensors, "proj_out.weight_scale": torch.ones(16, 1)}
    with pytest.raises(WeightsError, match=r"has unknown proj_out\.weight_scale"):
        load(extra)


def test_the_config_tells(tensors):
    ours = {"quant_method": "flux_redux_fp8", "format": 1}
    assert is_fp8({"quantization_config": ours})
    assert not is_fp8({})
    with pytest.raises(WeightsError, match="quantised by 'torchao', which is not read here"):
        is_fp8({"quantization_config": {"quant_method": "torchao"}})
    with pytest.raises(WeightsError, match="fp8 format 2, and this version reads 1"):
        is_fp8({"quantization_config": {**ours, "format": 2}})
