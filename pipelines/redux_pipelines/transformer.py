"""FLUX's transformer, for one modulation per step and folded text.

What does not change over a request (modulations, RoPE, embedded text) comes in ready. Both streams
live in one tensor ``x (B, T + L, H)``, T text rows before L image rows, which the blocks change in
place: for inference only. Query, key and value are one projection; a single block's MLP goes with
them; the last block leaves out what only text rows would need. Follows black-forest-labs/flux
``model.py``. Knows no checkpoints and no requests.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redux_pipelines.attention import Attention, Groups
from redux_pipelines.errors import WeightsError
from redux_pipelines.layers import Rope, gelu_, modulate, norm_rope
from redux_pipelines.modulation import DOUBLE_ROWS, FINAL_ROWS, SINGLE_ROWS, ModulationWeights

MLP_RATIO = 4
_HALF_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class FluxParams:
    """Sizes of a FLUX.1 transformer, in BFL's words; the defaults are FLUX.1-dev's."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    guidance_embed: bool = True

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "FluxParams":
        """Sizes stated by diffusers' ``transformer/config.json``, with its defaults.

        Raises ``WeightsError`` for a network that is not FLUX.1's.
        """
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        params = cls(
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            vec_in_dim=config["pooled_projection_dim"],
            context_in_dim=config["joint_attention_dim"],
            hidden_size=heads * head_dim,
            num_heads=heads,
            depth=config["num_layers"],
            depth_single_blocks=config["num_single_layers"],
            axes_dim=tuple(config.get("axes_dims_rope", cls().axes_dim)),
            guidance_embed=config.get("guidance_embeds", False),
        )
        if config.get("patch_size", 1) != 1 or sum(params.axes_dim) != head_dim:
            raise WeightsError(
                f"the transformer has patch_size={config.get('patch_size', 1)} and "
                f"axes_dims_rope={params.axes_dim}: FLUX.1 has 1, and axes that add up to "
                f"attention_head_dim={head_dim}"
            )
        return params


@dataclass(frozen=True, slots=True)
class Joint:
    """What all blocks of a request share: where the text ends, positions, key groups, attention."""

    txt_rows: int
    rope: Rope
    groups: Groups
    attention: Attention

    def attend(self, qk: Tensor, v: Tensor, first_query: int = 0) -> Tensor:
        """Attention of rows from ``first_query`` on: ``(B, Q, H)``; ``qk (B, S, 2, heads, D)``."""
        q, k = (each.transpose(1, 2) for each in qk.unbind(2))
        out = self.attention(q[:, :, first_query:], k, v.transpose(1, 2), self.groups)
        return out.transpose(1, 2).flatten(2)


class Stream(nn.Module):
    """The weights of one of the two streams, image or text, of a double block."""

    def __init__(self, hidden_size: int, head_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.qk_norm = nn.Parameter(torch.empty(2 * head_dim))
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.mlp_in = nn.Linear(hidden_size, MLP_RATIO * hidden_size)
        self.mlp_out = nn.Linear(MLP_RATIO * hidden_size, hidden_size)

    def project(self, x: Tensor, mod: Tensor, rope: Rope, qk: Tensor) -> Tensor:
        """Write queries and keys of ``x (B, n, H)`` into ``qk``; values ``(B, n, heads, D)``."""
        qkv = self.qkv(modulate(x, mod[0], mod[1])).view(*qk.shape[:2], 3, *qk.shape[3:])
        norm_rope(qkv[:, :, :2], self.qk_norm.view(2, 1, -1), rope, qk)
        values: Tensor = qkv[:, :, 2]
        return values

    def update_(self, x: Tensor, attn: Tensor, mod: Tensor) -> None:
        """Add attention and MLP to ``x``."""
        x.addcmul_(mod[2], self.proj(attn))
        h = gelu_(self.mlp_in(modulate(x, mod[3], mod[4])))
        x.addcmul_(mod[5], self.mlp_out(h))


class DoubleBlock(nn.Module):
    """Image and text with weights of their own and one attention."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.img = Stream(hidden_size, hidden_size // num_heads)
        self.txt = Stream(hidden_size, hidden_size // num_heads)

    def forward(self, x: Tensor, mod: Tensor, joint: Joint) -> None:
        """Change ``x (B, S, H)`` in place; ``mod (12, H)``."""
        parts = (
            (self.txt, slice(0, joint.txt_rows), mod[DOUBLE_ROWS:]),
            (self.img, slice(joint.txt_rows, x.shape[1]), mod[:DOUBLE_ROWS]),
        )
        attn = self._attend(x, parts, joint)
        for stream, span, own in parts:
            stream.update_(x[:, span], attn[:, span], own)

    def _attend(self, x: Tensor, parts: "_Parts", joint: Joint) -> Tensor:
        """``(B, S, H)``. Queries, keys and values are let go before the MLP needs its room."""
        qk = new_qk(x, self.num_heads)
        values = [
            stream.project(x[:, span], own, joint.rope.rows(span.start, span.stop), qk[:, span])
            for stream, span, own in parts
        ]
        return joint.attend(qk, torch.cat(values, dim=1))


_Parts = tuple[tuple[Stream, slice, Tensor], ...]


class SingleBlock(nn.Module):
    """Attention and MLP side by side, over both streams with the same weights."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear1 = nn.Linear(hidden_size, (3 + MLP_RATIO) * hidden_size)
        self.linear2 = nn.Linear((1 + MLP_RATIO) * hidden_size, hidden_size)
        self.qk_norm = nn.Parameter(torch.empty(2 * (hidden_size // num_heads)))

    def forward(self, x: Tensor, mod: Tensor, joint: Joint) -> None:
        """Change ``x (B, S, H)`` in place; ``mod (3, H)``."""
        up = self.linear1(modulate(x, mod[0], mod[1]))
        qkv = _heads(up[..., : 3 * x.shape[-1]], 3, self.num_heads)
        qk = new_qk(x, self.num_heads)
        norm_rope(qkv[:, :, :2], self.qk_norm.view(2, 1, -1), joint.rope, qk)
        self._update_(x, joint.attend(qk, qkv[:, :, 2]), up, mod[2])

    def forward_img(self, x: Tensor, mod: Tensor, joint: Joint) -> None:
        """``forward`` of image rows alone; of text rows only keys and values are computed."""
        end, rows, width = joint.txt_rows, x.shape[1], x.shape[-1]
        h = modulate(x, mod[0], mod[1])
        up = self.linear1(h[:, end:])
        kv = slice(width, 3 * width)
        txt_kv = F.linear(h[:, :end], self.linear1.weight[kv], self.linear1.bias[kv])
        txt_kv = _heads(txt_kv, 2, self.num_heads)
        qkv = _heads(up[..., : 3 * width], 3, self.num_heads)
        qk, weight = new_qk(x, self.num_heads), self.qk_norm.view(2, 1, -1)
        norm_rope(txt_kv[:, :, :1], weight[1:], joint.rope.rows(0, end), qk[:, :end, 1:])
        norm_rope(qkv[:, :, :2], weight, joint.rope.rows(end, rows), qk[:, end:])
        v = torch.cat([txt_kv[:, :, 1], qkv[:, :, 2]], dim=1)
        self._update_(x[:, end:], joint.attend(qk, v, first_query=end), up, mod[2])

    def _update_(self, x: Tensor, attn: Tensor, up: Tensor, gate: Tensor) -> None:
        """Add the block's output to ``x``; ``up (B, n, 7 H)`` holds q, k, v and the MLP's input.

        Attention goes where v was, beside the MLP: the second product reads both from there.
        """
        width = x.shape[-1]
        gelu_(up[..., 3 * width :])
        up[..., 2 * width : 3 * width] = attn
        x.addcmul_(gate, self.linear2(up.flatten(0, 1)[:, 2 * width :]).view(x.shape))


def new_qk(x: Tensor, num_heads: int) -> Tensor:
    """Room for queries and keys of all rows, ``(B, S, 2, heads, D)``."""
    return x.new_empty(*x.shape[:2], 2, num_heads, x.shape[-1] // num_heads)


def _heads(x: Tensor, parts: int, num_heads: int) -> Tensor:
    return x.view(*x.shape[:-1], parts, num_heads, x.shape[-1] // (parts * num_heads))


class Flux(nn.Module):
    """The whole network, without the order in which a request uses it."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        hidden, heads = params.hidden_size, params.num_heads
        self.params = params
        self.img_in = nn.Linear(params.in_channels, hidden)
        self.txt_in = nn.Linear(params.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden, heads) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(
            SingleBlock(hidden, heads) for _ in range(params.depth_single_blocks)
        )
        self.final = nn.Linear(hidden, params.out_channels)
        self.modulation = ModulationWeights(
            hidden,
            params.vec_in_dim,
            depth=params.depth,
            depth_single=params.depth_single_blocks,
            guidance=params.guidance_embed,
        )

    def forward(self, img: Tensor, txt: Tensor, mod: Tensor, joint: Joint) -> Tensor:
        """Velocity of ``img (B, L, C)``.

        ``txt (T, H)`` is embedded by ``txt_in``; ``mod`` is a step of ``ModulationWeights.table``.
        """
        end, rows = joint.txt_rows, joint.txt_rows + img.shape[1]
        x = img.new_empty(len(img), rows, self.params.hidden_size)
        x[:, :end] = txt
        x[:, end:] = self.img_in(img)
        for block, own in self._blocks(mod):
            block(x, own, joint)
            if x.dtype == torch.float16:  # activations of FLUX exceed its range here and there
                x.clamp_(-_HALF_MAX, _HALF_MAX)
        scale, shift = mod[-FINAL_ROWS:]
        out: Tensor = self.final(modulate(x[:, end:], shift, scale))
        return out

    def _blocks(self, mod: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Each block in turn, with its rows of ``mod``."""
        singles = list(self.single_blocks)
        last = [block.forward_img for block in singles[-1:]]
        row = 0
        for block in (*self.double_blocks, *singles[:-1], *last):
            count = 2 * DOUBLE_ROWS if isinstance(block, DoubleBlock) else SINGLE_ROWS
            yield block, mod[row : row + count]
            row += count
