"""Writes a random-weight FLUX.1 + Redux of under 2 MB, in the folder layout of the real one.

The classes, the tokenizer files and the wiring are those of FLUX.1-dev and FLUX.1-Redux-dev, so
diffusers' own pipelines load the result; its pictures are coloured noise. Weights are seeded and
scaled so that the picture, the prompt, the seed and the guidance each visibly change the output.
Knows nothing of how the checkpoint is used.
"""

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

_LATENT_CHANNELS = 4
_TEXT_WIDTH = 32
_POOLED_WIDTH = 32
_T5_TOKENS = 64
_CLIP_TOKENS = 77
_ENCODER_SIDE = 64
_ENCODER_WIDTH = 32


def build_tiny(
    directory: Path, *, vae_factor: int = 32, guidance: bool = True, heads: int = 3, seed: int = 0
) -> tuple[Path, Path]:
    """Write the checkpoint below ``directory`` and return its base and Redux directories.

    ``vae_factor`` is the autoencoder's scale, a power of two from 8 to 32: sizes are multiples of
    twice that many pixels. ``guidance=False`` makes a model like FLUX.1-schnell: no guidance
    embedding and a schedule that is not shifted by size. ``heads`` are the transformer's, 16 wide.
    Torch's global generator is left alone.
    """
    if vae_factor not in (8, 16, 32):
        raise ValueError(f"vae_factor={vae_factor} is not one of 8, 16, 32")
    base, redux = directory / "base", directory / "redux"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _write_base(base, vae_factor, guidance, heads)
        _write_redux(redux)
    return base, redux


def _write_base(base: Path, vae_factor: int, guidance: bool, heads: int) -> None:
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    parts: dict[str, Any] = {
        "transformer": _transformer(guidance, heads),
        "vae": _autoencoder(vae_factor),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance
        ),
        "text_encoder": _clip(len(clip_tokenizer), clip_tokenizer.eos_token_id),
        "tokenizer": clip_tokenizer,
        "text_encoder_2": _t5(len(t5_tokenizer)),
        "tokenizer_2": t5_tokenizer,
    }
    for name, part in parts.items():
        part.save_pretrained(base / name)
    _write_index(base, "FluxPipeline", {name: type(part) for name, part in parts.items()})


def _write_redux(redux: Path) -> None:
    parts: dict[str, Any] = {"image_encoder": _siglip(), "image_embedder": _redux_embedder()}
    for name, part in parts.items():
        part.save_pretrained(redux / name)
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": _ENCODER_SIDE, "width": _ENCODER_SIDE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    _write_json(redux / "feature_extractor" / "preprocessor_config.json", preprocessor)
    classes: dict[str, type | str] = {name: type(part) for name, part in parts.items()}
    classes["feature_extractor"] = "SiglipImageProcessor"
    _write_index(redux, "FluxPriorReduxPipeline", classes)


def _write_index(directory: Path, pipeline: str, classes: dict[str, Any]) -> None:
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    for name, cls in classes.items():
        module = cls.__module__ if isinstance(cls, type) else "transformers"
        library = "transformers" if module.startswith("transformers") else "diffusers"
        if isinstance(cls, type) and cls is ReduxImageEncoder:
            library = "flux"  # diffusers looks this one up in its own pipeline module
        index[name] = [library, cls.__name__ if isinstance(cls, type) else cls]
    _write_json(directory / "model_index.json", index)


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def _scale(parameters: torch.nn.Module, factor: float) -> None:
    """Multiply the weights of one layer: random nets are too quiet as they come."""
    with torch.no_grad():
        for parameter in parameters.parameters():
            parameter.mul_(factor)


def _transformer(guidance: bool, heads: int) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=4 * _LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_POOLED_WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    _scale(model.context_embedder, 4.0)
    for block in model.transformer_blocks:  # what text and Redux tokens say to image tokens
        _scale(block.attn.add_v_proj, 8.0)
        _scale(block.attn.to_out, 4.0)
    _scale(model.time_text_embed, 2.0)
    _scale(model.norm_out, 2.0)
    _scale(model.proj_out, 2.0)
    return model


def _autoencoder(vae_factor: int) -> AutoencoderKL:
    levels = vae_factor.bit_length()
    channels = [4 if level < levels - 2 else 16 for level in range(levels)]
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    _scale(model.decoder.conv_out, 1.5)
    return model


def _siglip() -> SiglipVisionModel:
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=_ENCODER_WIDTH,
            intermediate_size=2 * _ENCODER_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=_ENCODER_SIDE,
            patch_size=16,
        )
    )
    _scale(model.embeddings.patch_embedding, 8.0)
    return model


def _redux_embedder() -> ReduxImageEncoder:
    model = ReduxImageEncoder(redux_dim=_ENCODER_WIDTH, txt_in_features=_TEXT_WIDTH)
    _scale(model.redux_down, 8.0)
    return model


def _clip(vocabulary_size: int, eos_token_id: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=_POOLED_WIDTH,
        intermediate_size=2 * _POOLED_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=_CLIP_TOKENS,
        bos_token_id=eos_token_id - 1,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    return CLIPTextModel(config)


def _t5(vocabulary_size: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=_TEXT_WIDTH,
        d_kv=16,
        d_ff=2 * _TEXT_WIDTH,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def _clip_tokenizer() -> CLIPTokenizer:
    """Byte-level tokens without merges; the two special tokens come last, as in the real one."""
    letters = [*_byte_letters(), *(letter + "</w>" for letter in _byte_letters())]
    names = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=_CLIP_TOKENS)


def _t5_tokenizer() -> T5Tokenizer:
    """One token per printable ASCII character."""
    letters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    scores = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -2.0) for letter in letters),
    ]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=_T5_TOKENS)


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]
