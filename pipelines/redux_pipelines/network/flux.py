"""FLUX's transformer, for folded text and modulations that are computed beforehand.

What does not change over a request (modulations, RoPE, embedded text) comes in ready. Rows are T of
text before L of the image; blocks hand on a ``Residual``, whose last addition waits for the norm
that follows, and may change what they are given: for inference only. Query, key and value are one
projection; a single block's MLP goes with them; the last block leaves out what only text rows would
need. Follows black-forest-labs/flux ``model.py``. Knows no checkpoints and no requests.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from redux_pipelines.attention.groups import Attention, Groups
from redux_pipelines.errors import WeightsError
from redux_pipelines.fp8.linear import Fp8Linear, layers_of, parameters_of
from redux_pipelines.network.layers import Rope
from redux_pipelines.network.modulation import (
    DOUBLE_ROWS,
    FINAL_ROWS,
    SINGLE_ROWS,
    ModulationWeights,
)
from redux_pipelines.network.operators import Heads, Operators, Residual

MLP_RATIO = 4

SINGLE_WIDTHS = 3 + MLP_RATIO
"""Widths of a row of a single block's one projection: queries, keys, values, and the MLP."""

Vectors = tuple[Tensor, ...]
"""Rows of a modulation, each ``(H,)``, or ``(B, 1, H)`` for each image."""


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
            axes_dim=tuple(config.get("axes_dims_rope") or cls().axes_dim),
            guidance_embed=bool(config.get("guidance_embeds")),
        )
        if (config.get("patch_size") or 1) != 1 or sum(params.axes_dim) != head_dim:
            raise WeightsError(
                f"the transformer has patch_size={config.get('patch_size', 1)} and "
                f"axes_dims_rope={params.axes_dim}: FLUX.1 has 1, and axes that add up to "
                f"attention_head_dim={head_dim}"
            )
        return params


@dataclass(frozen=True, slots=True)
class BlockContext:
    """What all blocks of a run share: text, positions, key groups, attention.

    ``txt`` is ``(T, H)``, or ``(B, T, H)`` for each image. ``rope`` is in the form of
    ``operators``. Sizes are read off tensors, never kept as numbers: a compiler would make a graph
    for each.
    """

    txt: Tensor
    rope: Rope
    groups: Groups
    attention: Attention
    operators: Operators

    @property
    def txt_rows(self) -> int:
        """Rows of text before those of the image."""
        return self.txt.shape[-2]

    def attend(self, heads: Heads, into: Tensor | None = None, first_query: int = 0) -> Tensor:
        """Attention of rows from ``first_query`` on: ``(B, Q, H)``, in ``into`` if it is given.

        ``into`` shares no memory with ``heads``.
        """
        q, k, v = heads.q, heads.k, heads.v
        if first_query:
            q = q[:, :, first_query:]
        if into is None:
            return self.attention(q, k, v, self.groups).transpose(1, 2).flatten(2)
        room = into.view(*into.shape[:2], q.shape[1], q.shape[3]).transpose(1, 2)
        self.attention(q, k, v, self.groups, room)
        return into


class Stream(nn.Module):
    """The weights of one of the two streams, image or text, of a double block."""

    def __init__(self, hidden_size: int, head_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.qk_norm = nn.Parameter(torch.empty(2 * head_dim))
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.mlp_in = nn.Linear(hidden_size, MLP_RATIO * hidden_size)
        self.mlp_out = nn.Linear(MLP_RATIO * hidden_size, hidden_size)

    def mlp(self, stream: Residual, mod: Vectors, operators: Operators) -> Residual:
        """The stream after its MLP; ``mod`` are its six."""
        own = layers_of(self)
        x, y = operators.normed_mlp(stream, mod[3], mod[4], own["mlp_in"], own["mlp_out"])
        return Residual(x, y, mod[5])


class DoubleBlock(nn.Module):
    """Image and text with weights of their own and one attention."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.img = Stream(hidden_size, hidden_size // num_heads)
        self.txt = Stream(hidden_size, hidden_size // num_heads)

    def forward(
        self, txt: Residual, img: Residual, mod: Tensor, context: BlockContext
    ) -> tuple[Residual, Residual]:
        """Both streams after the block; ``mod (12, H)``."""
        vectors, own = mod.unbind(0), (layers_of(self)["txt"], layers_of(self)["img"])
        mods = (vectors[DOUBLE_ROWS:], vectors[:DOUBLE_ROWS])
        txt_x, img_x, attn = self._attend((txt, img), mods, own, context)
        ops, end = context.operators, context.txt_rows
        proj = [layers_of(each)["proj"] for each in own]
        after_txt = Residual(txt_x, ops.linear(attn[:, :end], proj[0]), mods[0][2])
        after_img = Residual(img_x, ops.linear(attn[:, end:], proj[1]), mods[1][2])
        return own[0].mlp(after_txt, mods[0], ops), own[1].mlp(after_img, mods[1], ops)

    def _attend(
        self,
        streams: tuple[Residual, Residual],
        mods: tuple[Vectors, Vectors],
        own: tuple[Stream, Stream],
        context: BlockContext,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The settled streams, and attention ``(B, S, H)``.

        Projections are let go before attention, heads before the MLP needs its room. These lie as
        far apart as a single block's: cuDNN builds a plan for all strides that it has not met,
        which others report to take tenths of a second. What lies between is less than what a single
        block holds.
        """
        (txt, img), end, ops = streams, context.txt_rows, context.operators
        rows = end + img.x.shape[1]
        heads = ops.new_heads(img.x, rows, self.num_heads, SINGLE_WIDTHS)
        settled = []
        for stream, mod, weights, first in (
            (txt, mods[0], own[0], 0),
            (img, mods[1], own[1], end),
        ):
            x, qkv = ops.normed_linear(stream, mod[0], mod[1], layers_of(weights)["qkv"])
            rope = context.rope.rows(first, first + x.shape[1])
            ops.place_heads(qkv, parameters_of(weights)["qk_norm"], rope, heads, first)
            settled.append(x)
            del qkv
        return settled[0], settled[1], context.attend(heads)


class SingleBlock(nn.Module):
    """Attention and MLP side by side, over both streams with the same weights."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear1 = nn.Linear(hidden_size, SINGLE_WIDTHS * hidden_size)
        self.linear2 = nn.Linear((1 + MLP_RATIO) * hidden_size, hidden_size)
        self.qk_norm = nn.Parameter(torch.empty(2 * (hidden_size // num_heads)))

    def forward(self, stream: Residual, mod: Tensor, context: BlockContext) -> Residual:
        """Both streams, text first, after the block; ``mod (3, H)``."""
        ops, (shift, scale, gate) = context.operators, mod.unbind(0)
        linear1, linear2 = layers_of(self)["linear1"], layers_of(self)["linear2"]
        own = ops.single_in(stream, shift, scale, linear1, linear2)
        weight = parameters_of(self)["qk_norm"]
        heads = ops.single_heads(own.qkv, weight, context.rope, self.num_heads)
        y = ops.single_out(own, lambda into: context.attend(heads, into), linear2)
        return Residual(own.x, y, gate)

    def forward_img(self, stream: Residual, mod: Tensor, context: BlockContext) -> Residual:
        """``forward`` of image rows alone; of text rows only keys and values are needed."""
        ops, end, rows = context.operators, context.txt_rows, stream.x.shape[1]
        shift, scale, gate = mod.unbind(0)
        txt, img = stream.rows(0, end), stream.rows(end, rows)
        without_mlp = slice(0, 3 * stream.x.shape[-1])
        _, txt_qkv = ops.normed_linear(txt, shift, scale, self.linear1, without_mlp)
        own = ops.single_in(img, shift, scale, self.linear1, self.linear2)
        heads = ops.new_heads(own.x, rows, self.num_heads)
        for qkv, first in ((txt_qkv, 0), (own.qkv, end)):
            rope = context.rope.rows(first, first + qkv.shape[1])
            ops.place_heads(qkv, self.qk_norm, rope, heads, first)
        y = ops.single_out(
            own, lambda into: context.attend(heads, into, first_query=end), self.linear2
        )
        return Residual(own.x, y, gate)


class Flux(nn.Module):
    """The whole network, without the order in which a request uses it.

    ``blocks_ready``, if set, is called with a block's index right before that block runs: where
    weights do not live on the device it brings them.
    """

    blocks_ready: Callable[[int], None] | None = None

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

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All blocks in their order, double ones first."""
        return (*self.double_blocks, *self.single_blocks)

    @property
    def has_fp8(self) -> bool:
        """Whether any of its layers multiplies in fp8."""
        return any(isinstance(each, Fp8Linear) for each in self.modules())

    @property
    def num_blocks(self) -> int:
        """Double and single blocks."""
        return len(self.double_blocks) + len(self.single_blocks)

    def forward(self, img: Tensor, txt: Tensor, mod: Tensor, context: BlockContext) -> Tensor:
        """Velocity of ``img (B, L, C)``.

        ``txt (T, H)``, or ``(B, T, H)`` for each image, is embedded by ``txt_in``; ``mod`` is a
        step of a ``Modulation``.
        """
        x = self.run(self.embed(img, txt), mod, context, 0, self.num_blocks)
        return self.project_out(x, mod, context)

    def embed(self, img: Tensor, txt: Tensor) -> Tensor:
        """Text and image rows before the first block, ``(B, S, H)``."""
        return torch.cat([txt.expand(len(img), -1, -1), self.img_in(img)], dim=1)

    def run(self, x: Tensor, mod: Tensor, context: BlockContext, first: int, end: int) -> Tensor:
        """Rows ``x (B, S, H)``, which may be changed, after blocks ``first`` up to ``end``.

        Double blocks count before single ones. After the very last block only image rows are
        left: ``(B, L, H)``.
        """
        blocks, doubles = self.blocks, self.params.depth
        if not torch.compiler.is_compiling():
            context = replace(context, operators=context.operators.for_run())
        if first < doubles:
            x = self._run_doubles(x, mod, context, range(first, min(end, doubles)))
        stream = Residual(x)
        for index in range(max(first, doubles), end):
            self._ready(index)
            block: Any = blocks[index]
            run = block.forward_img if index == len(blocks) - 1 else block
            stream = run(stream, self._rows(mod, index), context)
        x = context.operators.settle(stream)
        ends_with_doubles = end == len(blocks) == doubles
        return x[:, context.txt_rows :] if ends_with_doubles else x

    def _run_doubles(self, x: Tensor, mod: Tensor, context: BlockContext, blocks: range) -> Tensor:
        end, doubles = context.txt_rows, self.blocks
        streams = Residual(x[:, :end]), Residual(x[:, end:])
        for index in blocks:
            self._ready(index)
            streams = doubles[index](*streams, self._rows(mod, index), context)
        return torch.cat([context.operators.settle(each) for each in streams], dim=1)

    def _ready(self, index: int) -> None:
        if self.blocks_ready is not None:
            self.blocks_ready(index)

    def project_out(self, x: Tensor, mod: Tensor, context: BlockContext) -> Tensor:
        """Velocity ``(B, L, C)`` from what the last block left."""
        scale, shift = mod[-FINAL_ROWS:]
        return context.operators.normed_linear(Residual(x), shift, scale, self.final)[1]

    def _rows(self, mod: Tensor, index: int) -> Tensor:
        """The rows of a step's modulations that belong to a block."""
        doubles = self.params.depth
        if index < doubles:
            first, count = 2 * DOUBLE_ROWS * index, 2 * DOUBLE_ROWS
        else:
            first, count = 2 * DOUBLE_ROWS * doubles + SINGLE_ROWS * (index - doubles), SINGLE_ROWS
        return mod[first : first + count]
