"""Every tensor of diffusers finds its place in ours, one at a time."""

import json
import weakref

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from pipelines.networks import CPU, FULL_WIDTH, SMALL, diffusers_model
from redux_pipelines.errors import WeightsError
from redux_pipelines.loading.flux_weights import WEIGHTS, Shards, key_map, load_flux
from redux_pipelines.memory.model_sizes import TransformerSize
from redux_pipelines.network.flux import Flux, FluxParams

PARAMS = FluxParams.of(SMALL)


@pytest.fixture(scope="module")
def tensors():
    return diffusers_model().state_dict()


def _load(tensors, dtype=torch.float32, **options):
    return load_flux(PARAMS, tensors, device=CPU, dtype=dtype, **options)


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_full_size_keys_are_those_of_diffusers(guidance):
    with torch.device("meta"):
        flux = Flux(FluxParams(guidance_embed=guidance))
        theirs = FluxTransformer2DModel(guidance_embeds=guidance).state_dict()
    sources, ours = key_map(flux), dict(flux.named_parameters())
    assert sources.keys() == ours.keys()
    used = [key for keys in sources.values() for key in keys]
    assert sorted(used) == sorted(theirs)
    for name, keys in sources.items():
        parts = [theirs[key].shape for key in keys]
        assert sum(part[0] for part in parts) == ours[name].shape[0], name
        assert {tuple(part[1:]) for part in parts} == {tuple(ours[name].shape[1:])}, name


def test_sizes_are_read_from_the_config_with_the_defaults_of_diffusers():
    config = {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
    }
    assert FluxParams.of({**config, "guidance_embeds": True}) == FluxParams()
    for absent in ({}, {"guidance_embeds": None}, {"guidance_embeds": False}):
        assert FluxParams.of({**config, **absent}) == FluxParams(guidance_embed=False)
        assert not TransformerSize.of({**config, **absent}).has_guidance
    nulls = dict.fromkeys(("out_channels", "axes_dims_rope", "patch_size"))
    assert FluxParams.of({**config, **nulls}) == FluxParams(guidance_embed=False)
    with torch.device("meta"):
        model = FluxTransformer2DModel(**FULL_WIDTH)
    assert FluxParams.of(model.config) == FluxParams(depth=1, depth_single_blocks=1)


def test_parts_are_stacked_in_order(tensors):
    flux = _load(tensors)
    for name, keys in key_map(flux).items():
        expected = torch.cat([tensors[key] for key in keys])
        assert torch.equal(flux.get_parameter(name), expected), name


def test_weights_are_converted_and_frozen(tensors):
    flux = _load(tensors, torch.bfloat16)
    assert {each.dtype for each in flux.parameters()} == {torch.bfloat16}
    assert not any(each.requires_grad for each in flux.parameters())
    assert not flux.training


def test_the_source_is_not_kept(tensors):
    flux = _load(tensors)
    held = {each.untyped_storage().data_ptr() for each in flux.parameters()}
    assert not held & {each.untyped_storage().data_ptr() for each in tensors.values()}


class _OneAtATime(dict):
    """Hands out copies, and sees that the one before is gone."""

    def __getitem__(self, key):
        assert not hasattr(self, "last") or self.last() is None
        tensor = super().__getitem__(key).clone()
        self.last = weakref.ref(tensor)
        return tensor


def test_no_second_tensor_is_read_before_the_first_is_let_go(tensors):
    source = _OneAtATime(tensors)
    _load(source, torch.bfloat16)
    assert source.last() is None


@pytest.mark.parametrize(
    "key",
    ["single_transformer_blocks.1.attn.norm_k.weight", "transformer_blocks.0.attn.to_out.0.bias"],
)
def test_a_missing_tensor_is_named(tensors, key):
    with pytest.raises(WeightsError, match=rf"the transformer lacks {key}$"):
        _load({name: tensor for name, tensor in tensors.items() if name != key})


def test_tensors_without_a_place_are_named(tensors):
    extra = {**tensors, "lora.down.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"the transformer has unknown lora\.down\.weight$"):
        _load(extra)


def test_many_problems_are_counted(tensors):
    with pytest.raises(WeightsError, match=r"lacks context_embedder.bias, .* and 1\d\d more"):
        _load({"x_embedder.weight": tensors["x_embedder.weight"], "other": torch.zeros(1)})


@pytest.mark.parametrize("shape", [(47, 48), (49, 48), (48, 47), (48,)], ids=str)
@pytest.mark.parametrize("part", ["to_q", "to_v", "to_out.0"])
def test_a_tensor_of_another_shape_is_named(tensors, shape, part):
    key = f"transformer_blocks.1.attn.{part}.weight"
    wrong = {**tensors, key: torch.zeros(shape)}
    with pytest.raises(WeightsError, match=r"transformer_blocks\.1\.attn"):
        _load(wrong)


def test_a_model_without_guidance_has_no_place_for_its_embedder(tensors):
    params = FluxParams.of({**SMALL, "guidance_embeds": False})
    with pytest.raises(WeightsError, match=r"has unknown .*guidance_embedder"):
        load_flux(params, tensors, device=CPU, dtype=torch.float32)


def test_one_file_and_shards_read_the_same(tensors, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    save_file(tensors, tmp_path / "one" / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / "many" / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "many" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    one, many = Shards(tmp_path / "one"), Shards(tmp_path / "many")
    assert len(one) == len(many) == len(tensors)
    assert set(one) == set(many) == set(tensors)
    assert all(torch.equal(one[key], many[key]) for key in tensors)
