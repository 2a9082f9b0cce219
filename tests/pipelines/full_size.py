"""The networks of FLUX.1-dev and FLUX.1-Redux-dev at their own sizes, as their authors define them.

On the meta device, where they take no memory.
"""

import json
import shutil

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

T5 = T5Config(
    vocab_size=32_128,
    d_model=4096,
    d_kv=64,
    d_ff=10_240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
)
CLIP = CLIPTextConfig(
    vocab_size=49_408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
)
SIGLIP = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

MAKERS = {
    "transformer": lambda: FluxTransformer2DModel(guidance_embeds=True),
    "T5": lambda: T5EncoderModel(T5),
    "CLIP": lambda: CLIPTextModel(CLIP),
    "SigLIP": lambda: SiglipVisionModel(SIGLIP),
    "Redux": lambda: ReduxImageEncoder(redux_dim=1152, txt_in_features=4096),
    "VAE": lambda: AutoencoderKL(**VAE),
}


def on_meta(name):
    with torch.device("meta"):
        return MAKERS[name]()


def count(module):
    return sum(each.numel() for each in module.parameters())


def write_checkpoint(tiny, directory):
    """A checkpoint of FLUX.1's sizes whose weights are all zero: sparse files, no room on disk.

    Tokenizers and scheduler are those of ``tiny``; pictures come out grey. Returns the base's and
    Redux's directories.
    """
    base = shutil.copytree(tiny.base, directory / "base", ignore=_without_weights)
    redux = shutil.copytree(tiny.redux, directory / "redux", ignore=_without_weights)
    folders = {
        "transformer": base / "transformer",
        "T5": base / "text_encoder_2",
        "CLIP": base / "text_encoder",
        "SigLIP": redux / "image_encoder",
        "Redux": redux / "image_embedder",
        "VAE": base / "vae",
    }
    for name, folder in folders.items():
        _write_zeros(on_meta(name), folder)
    preprocessor = redux / "feature_extractor" / "preprocessor_config.json"
    config = json.loads(preprocessor.read_text())
    preprocessor.write_text(json.dumps({**config, "size": {"height": 384, "width": 384}}))
    return base, redux


def _without_weights(_folder, names):
    return [name for name in names if name.endswith(".safetensors")]


def _write_zeros(module, folder):
    """The module's configuration, and its weights as bfloat16 zeros."""
    is_diffusers = hasattr(module, "save_config")
    if is_diffusers:
        module.save_config(folder)
    else:
        module.config.save_pretrained(folder)
    end, header, seen = 0, {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen or not isinstance(tensor, torch.nn.Parameter):
            continue
        seen.add(id(tensor))
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [start, end]}
    written = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    name = "diffusion_pytorch_model" if is_diffusers else "model"
    with (folder / f"{name}.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(file.tell() + end)
