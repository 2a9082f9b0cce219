"""How large everything is: FLUX.1's own sizes, or the same shape in little for a CPU.

Configurations are in diffusers' and transformers' words. Imports no torch; measures nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DOUBLES, SINGLES = 2, 3
"""Blocks of the network that is compared with float32."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the networks, and of what is asked of them.

    ``side`` is that of the picture which most is measured with. ``repeats`` are of images,
    ``calls`` of steps and smaller things. ``attention_rows`` and ``kernel_rows`` are folded rows.
    """

    name: str
    transformer: Mapping[str, Any]
    siglip: Mapping[str, Any]
    vae: Mapping[str, Any]
    side: int
    other_sides: tuple[int, ...]
    steps: int
    repeats: int
    calls: int
    requests: int
    attention_rows: tuple[int, ...]
    kernel_rows: int
    copied_bytes: int
    product_side: int
    tests: tuple[str, ...] = field(default=("tests/kernels", "tests/pipelines"))

    @property
    def sides(self) -> tuple[int, ...]:
        """Of all square pictures."""
        return (self.side, *self.other_sides)


_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}

FULL = Scale(
    name="full",
    transformer={
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    siglip={
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    vae={
        **_VAE,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "norm_num_groups": 32,
    },
    side=1024,
    other_sides=(512, 1536),
    steps=28,
    repeats=3,
    calls=10,
    requests=10,
    attention_rows=(1754, 4826, 9946),
    kernel_rows=4826,
    copied_bytes=2**31,
    product_side=8192,
)
"""FLUX.1-dev and FLUX.1-Redux-dev. Rows are those of 512², 1024² and 1536², text folded."""

SMALL = Scale(
    name="small",
    transformer={
        "in_channels": 64,
        "num_layers": DOUBLES,
        "num_single_layers": SINGLES,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (8, 12, 12),
    },
    siglip={
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
    },
    vae={
        **_VAE,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    side=512,
    other_sides=(528, 544),
    steps=2,
    repeats=1,
    calls=1,
    requests=3,
    attention_rows=(40, 60, 80),
    kernel_rows=64,
    copied_bytes=2**20,
    product_side=64,
    tests=("tests/kernels/test_dispatch.py",),
)
"""The same shape, for a CPU: that it runs is all it says."""
