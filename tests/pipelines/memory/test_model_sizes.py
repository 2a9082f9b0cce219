"""Sizes without tensors are those of the real networks, and of files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from pipelines import full_size
from redux_pipelines.memory.model_sizes import (
    FLUX_DEV,
    FLUX_SCHNELL,
    ModelSizes,
    TransformerSize,
    read_sizes,
)
from redux_pipelines.network.flux import Flux, FluxParams
from redux_weights.embedded import find_mini

GOLDEN = {
    "transformer": (FLUX_DEV.transformer.parameters, 11_901_408_320),
    "T5": (FLUX_DEV.t5.parameters, 4_762_310_656),
    "CLIP": (FLUX_DEV.clip.parameters, 123_060_480),
    "SigLIP": (FLUX_DEV.siglip.parameters, 428_225_600),
    "Redux": (FLUX_DEV.redux, 64_503_808),
    "VAE": (FLUX_DEV.vae, 83_819_683),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_full_size_is_that_of_the_authors_class(name):
    ours, golden = GOLDEN[name]
    assert ours == golden == full_size.count(full_size.on_meta(name))


def test_schnell_lacks_the_guidance_embedder():
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=False)
    assert FLUX_SCHNELL.transformer.parameters == full_size.count(model)


def test_all_of_a_model_is_the_sum():
    assert FLUX_DEV.parameters == sum(golden for _, golden in GOLDEN.values())


def test_the_longest_layer_of_t5_is_the_first():
    layers = full_size.on_meta("T5").encoder.block
    assert (FLUX_DEV.t5.layer, FLUX_DEV.t5.layers) == (full_size.count(layers[0]), len(layers))


@pytest.fixture(scope="module")
def flux():
    with torch.device("meta"):
        return Flux(FluxParams())


def test_every_block_is_as_large_as_ours(flux):
    counted = [full_size.count(block) for block in flux.blocks]
    assert [block.parameters for block in FLUX_DEV.transformer.blocks] == counted
    assert len(counted) == 57


def test_an_fp8_block_has_a_byte_an_element_and_a_scale_a_row(flux):
    for block, size in zip(flux.blocks, FLUX_DEV.transformer.blocks, strict=True):
        weights = [each for each in block.parameters() if each.ndim == 2]
        vectors = [each for each in block.parameters() if each.ndim != 2]
        expected = sum(each.numel() + 4 * len(each) for each in weights)
        expected += 2 * sum(each.numel() for each in vectors)
        assert size.size_bytes(2, is_fp8=True) == expected


def test_modulation_is_apart_from_blocks_and_embedders(flux):
    size, layers = FLUX_DEV.transformer, flux.modulation.layers
    assert size.modulation == full_size.count(layers) == 3_247_448_064
    assert size.modulation_layer == max(full_size.count(layer) for layer in layers)
    assert size.modulation_rows == sum(len(layer.bias) for layer in layers) // 3072
    blocks = sum(full_size.count(block) for block in flux.blocks)
    assert size.embedders == full_size.count(flux) - blocks - size.modulation


def _modules(base, redux):
    from diffusers import AutoencoderKL
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
    from transformers import CLIPTextModel, SiglipVisionModel, T5EncoderModel

    load = {
        base / "transformer": FluxTransformer2DModel,
        base / "vae": AutoencoderKL,
        base / "text_encoder": CLIPTextModel,
        base / "text_encoder_2": T5EncoderModel,
        redux / "image_encoder": SiglipVisionModel,
        redux / "image_embedder": ReduxImageEncoder,
    }
    return {folder.name: cls.from_pretrained(folder) for folder, cls in load.items()}


@pytest.mark.parametrize("which", ["tiny", "mini"])
def test_sizes_read_from_files_are_those_of_the_loaded_parts(which, tiny):
    found = find_mini() if which == "mini" else tiny
    sizes, modules = read_sizes(found.base, found.redux), _modules(found.base, found.redux)
    counts = {name: full_size.count(module) for name, module in modules.items()}
    assert sizes.transformer.parameters == counts["transformer"]
    assert (sizes.vae, sizes.redux) == (counts["vae"], counts["image_embedder"])
    assert sizes.siglip.parameters == counts["image_encoder"]
    assert sizes.clip.parameters == counts["text_encoder"]
    assert sizes.t5.parameters == counts["text_encoder_2"]
    assert sizes.t5.layer == full_size.count(modules["text_encoder_2"].encoder.block[0])
    assert sizes.vae_channels == tuple(modules["vae"].config.block_out_channels)
    assert not sizes.is_fp8


@pytest.fixture
def copy(tiny, tmp_path):
    import shutil

    shutil.copytree(tiny.base, tmp_path / "base")
    shutil.copytree(tiny.redux, tmp_path / "redux")
    return tmp_path / "base", tmp_path / "redux"


def test_text_encoders_may_be_absent(copy):
    import shutil

    base, redux = copy
    for name in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(base / name)
    sizes = read_sizes(base, redux)
    assert sizes.t5 is None
    assert sizes.clip is None


def test_shards_are_summed(copy, tiny):
    from safetensors.torch import load_file

    base, redux = copy
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names, shards = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        shard = f"part-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, base / "vae" / shard)
        shards.update(dict.fromkeys(part, shard))
    index = base / "vae" / f"{path.name}.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert read_sizes(base, redux).vae == read_sizes(tiny.base, tiny.redux).vae


def test_weights_stored_in_fp8_are_noticed(copy):
    from safetensors.torch import load_file

    base, redux = copy
    path = base / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    assert read_sizes(base, redux).is_fp8


def test_a_folder_without_weights_is_said(copy):
    base, redux = copy
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae holds no safetensors weights"):
        read_sizes(base, redux)


def test_a_model_of_one_kind_of_blocks_has_a_modulation():
    size = TransformerSize(hidden=48, head_dim=16, depth=0, depth_single=2)
    with torch.device("meta"):
        params = FluxParams(hidden_size=48, num_heads=3, depth=0, depth_single_blocks=2)
        flux = Flux(params)
    assert size.parameters == full_size.count(flux)
    assert size.modulation_layer == full_size.count(flux.modulation.layers[0])


def test_pixels_per_token_follow_from_the_autoencoder():
    assert (FLUX_DEV.vae_factor, FLUX_DEV.size_multiple) == (8, 16)
    assert ModelSizes(vae_channels=(8, 8, 8)).size_multiple == 8


def test_the_planner_needs_no_torch():
    folder = Path(sys.modules[ModelSizes.__module__].__file__).parents[2]
    code = (
        f"import sys; sys.path[:0] = [{str(folder)!r}]\n"
        "from redux_pipelines.memory import cards, model_sizes, plan\n"
        "plan.plan(model_sizes.FLUX_DEV, cards.sold_as(24), plan.Options())\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
