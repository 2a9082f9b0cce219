"""The mini model: FLUX's transformer, SigLIP, the Redux embedder, CLIP and T5, all of them small.

Everything but the autoencoder, which is trained before. The classes are those of FLUX.1-dev and
FLUX.1-Redux-dev; only sizes and starting values are our own. Knows no data and no losses.
"""

import math
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from training.settings import ModelSizes

_POSITION_FREQUENCIES = (1.0, 0.5, 0.268, 0.134, 0.072, 0.036)
_RESIDUAL_OUTPUTS = ("to_out", "to_add_out", "proj_out", "net.2")


class MiniModel(nn.Module):
    """All trained parts, named as their folders in a checkpoint."""

    def __init__(
        self, sizes: ModelSizes, latent_channels: int, clip_pieces: int, t5_pieces: int
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.transformer: Any = _transformer(sizes, latent_channels)
        self.image_encoder: Any = _image_encoder(sizes)
        self.image_embedder: Any = ReduxImageEncoder(
            redux_dim=sizes.encoder_width, txt_in_features=sizes.text_width
        )
        self.text_encoder: Any = _clip(sizes, clip_pieces)
        self.text_encoder_2: Any = _t5(sizes, t5_pieces)

    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """SigLIP features ``(B, N, E)`` and Redux tokens ``(B, N, D)`` of pictures in -1…1."""
        features = self.image_encoder(pixel_values=pictures).last_hidden_state
        return features, self.image_embedder(features).image_embeds

    def encode_text(self, clip_ids: Tensor, t5_ids: Tensor, is_given: Tensor) -> tuple[Any, Any]:
        """T5 tokens ``(B, T, D)`` and pooled vectors ``(B, P)``; zeros where ``is_given`` is 0.

        Zeros stand for no prompt, as in the Redux model card.
        """
        tokens = self.text_encoder_2(input_ids=t5_ids).last_hidden_state
        pooled = self.text_encoder(input_ids=clip_ids).pooler_output
        return tokens * is_given[:, None, None], pooled * is_given[:, None]


def _transformer(sizes: ModelSizes, latent_channels: int) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * latent_channels,
        num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=sizes.head_width,
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=sizes.pooled_width,
        guidance_embeds=True,
        axes_dims_rope=sizes.rope_axes,
    )
    for name, parameter in transformer.named_parameters():
        _initialize(name, parameter, sizes.width)
    return transformer


def _initialize(name: str, parameter: Tensor, width: int) -> None:
    """Modulations start as constants (gates open), the output at zero, matrices orthogonal-ish."""
    is_modulation = ".norm" in name and ".linear." in name
    if is_modulation or name.startswith(("norm_out.linear", "proj_out")):
        nn.init.zeros_(parameter)
        if is_modulation and name.endswith("bias"):
            _open_gates(name, parameter, width)
    elif parameter.ndim == 2 and "blocks" in name:
        gain = 0.5 if any(part in name for part in _RESIDUAL_OUTPUTS) else 1.0
        nn.init.normal_(parameter, std=gain / math.sqrt(parameter.shape[1]))
    elif name.endswith("bias"):
        nn.init.zeros_(parameter)


@torch.no_grad()
def _open_gates(name: str, bias: Tensor, width: int) -> None:
    """Chunks of the modulation are shift, scale, gate (attention), shift, scale, gate (MLP)."""
    bias[2 * width : 3 * width] = 1
    if name.startswith("transformer_blocks"):
        bias[5 * width : 6 * width] = 1


def _image_encoder(sizes: ModelSizes) -> SiglipVisionModel:
    encoder = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=sizes.encoder_width,
            intermediate_size=3 * sizes.encoder_width,
            num_hidden_layers=sizes.encoder_layers,
            num_attention_heads=sizes.encoder_heads,
            image_size=sizes.encoder_side,
            patch_size=sizes.encoder_patch,
            vision_use_head=False,
        )
    )
    embeddings = [m for name, m in encoder.named_modules() if name.endswith("position_embedding")]
    _place_on_waves(embeddings[0].weight, sizes.encoder_grid)
    return encoder


@torch.no_grad()
def _place_on_waves(weight: Tensor, side: int) -> None:
    """Start position embeddings ``(side², E)`` as sines of row and column.

    Their frequencies are like RoPE's, so attention can learn to align Redux tokens, which all have
    position 0 for the transformer, with the latent tokens of the same place.
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [
        function(axis.flatten() * frequency)
        for frequency in _POSITION_FREQUENCIES
        for axis in (rows, columns)
        for function in (torch.sin, torch.cos)
    ]
    table = torch.stack(waves, dim=1)[:, : weight.shape[1]]
    weight.normal_(0, 0.02)
    weight[:, : table.shape[1]] += 0.5 * table


def _clip(sizes: ModelSizes, pieces: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=pieces,
        hidden_size=sizes.pooled_width,
        intermediate_size=2 * sizes.pooled_width,
        num_hidden_layers=1,
        num_attention_heads=sizes.pooled_heads,
        max_position_embeddings=sizes.text_tokens,
        projection_dim=sizes.pooled_width,
        bos_token_id=pieces - 2,
        eos_token_id=pieces - 1,
        pad_token_id=pieces - 1,
    )
    return CLIPTextModel(config)


def _t5(sizes: ModelSizes, pieces: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=pieces,
        d_model=sizes.text_width,
        d_kv=sizes.text_width // sizes.text_heads,
        d_ff=2 * sizes.text_width,
        num_layers=1,
        num_heads=sizes.text_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon's share: weight matrices inside blocks, but no modulations."""
    inside = "blocks." in name or "encoder.layers" in name or "image_embedder" in name
    return inside and parameter.ndim == 2 and ".norm" not in name
