"""FLUX's two kinds of block, on the operators: for counting launches and tracing graphs.

Linears are torch's; attention is torch's, as one opaque operator that also gives its log-sum-exp.
The modulation comes ready from a table, as it does for a whole schedule at once.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from redux_kernels.gate_residual_adaln import gate_residual_adaln
from redux_kernels.gelu_into import gelu_into
from redux_kernels.merge_groups import merge_groups
from redux_kernels.qk_norm_rope import qk_norm_rope


class Model(NamedTuple):
    heads: int
    d: int

    @property
    def width(self) -> int:
        return self.heads * self.d


FLUX = Model(24, 128)
MINI = Model(4, 64)
COPIES = 512.0


@torch.library.custom_op("redux_tests::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp); the output's rows come before its heads, as in flash attentions."""
    logits = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    out = (logits.softmax(dim=-1) @ v.float()).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), logits.logsumexp(dim=-1)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, rows, d = q.shape
    out = q.new_empty((batch, rows, heads, d)).transpose(1, 2)
    return out, q.new_empty((batch, heads, rows), dtype=torch.float32)


class Stream(torch.nn.Module):
    """One stream's linears in a double block."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        width = model.width
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.project = torch.nn.Linear(width, width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)
        self.q_weight = torch.nn.Parameter(torch.ones(model.d))
        self.k_weight = torch.nn.Parameter(torch.ones(model.d))

    def mlp(self, h: Tensor) -> Tensor:
        up = self.up(h)
        activated = torch.empty_like(up)
        gelu_into(up, activated)
        return self.down(activated)


class DoubleBlock(torch.nn.Module):
    """Takes and gives streams with their next norm: each block ends with its successor's."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.text = Stream(model)
        self.image = Stream(model)

    def forward(self, text: Tensor, text_h: Tensor, image: Tensor, image_h: Tensor,
                cos: Tensor, sin: Tensor, vectors: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        batch, split, _ = text.shape
        total = split + image.shape[1]
        shape = (batch, self.model.heads, total, self.model.d)
        q, k, v = (text.new_empty(shape) for _ in range(3))
        for stream, h, first in ((self.text, text_h, 0), (self.image, image_h, split)):
            angles = cos[first : first + h.shape[1]], sin[first : first + h.shape[1]]
            qk_norm_rope(stream.qkv(h), stream.q_weight, stream.k_weight, *angles, q, k, v, first)
        out, _ = attend(q, k, v)
        out = out.transpose(1, 2).reshape(batch, total, -1)
        gate, scale, shift, gate_2, scale_2, shift_2 = vectors.chunk(6, dim=-1)
        results = []
        for stream, x, rows in ((self.text, text, out[:, :split]),
                                (self.image, image, out[:, split:])):  # fmt: skip
            x, h = gate_residual_adaln(x, stream.project(rows), gate, scale, shift)
            results += gate_residual_adaln(x, stream.mlp(h), gate_2, scale_2, shift_2)
        return tuple(results)


class SingleBlock(torch.nn.Module):
    """One stream; row 0 is the folded text token, which stands for ``COPIES`` equal ones."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.linear1 = torch.nn.Linear(model.width, 7 * model.width)
        self.linear2 = torch.nn.Linear(5 * model.width, model.width)
        self.q_weight = torch.nn.Parameter(torch.ones(model.d))
        self.k_weight = torch.nn.Parameter(torch.ones(model.d))

    def forward(
        self, x: Tensor, h: Tensor, cos: Tensor, sin: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        heads, d, width = *self.model, self.model.width
        qkv, mlp = self.linear1(h).split((3 * width, 4 * width), dim=-1)
        q, k = (x.new_empty((x.shape[0], heads, x.shape[1], d)) for _ in range(2))
        qk_norm_rope(qkv, self.q_weight, self.k_weight, cos, sin, q, k, None)
        v = qkv[..., 2 * width :].unflatten(-1, (heads, d)).transpose(1, 2)
        out, lse = attend(q, k[:, :, 1:], v[:, :, 1:])
        both = x.new_empty((*x.shape[:2], 5 * width))
        into = both[..., :width].unflatten(-1, (heads, d)).transpose(1, 2)
        one = [k[:, :, 0]], [v[:, :, 0]], [math.log(COPIES)]
        merge_groups([out], [lse], [0.0], q, *one, into)
        gelu_into(mlp, both, column=width)
        gate, scale, shift = vectors.chunk(3, dim=-1)
        return gate_residual_adaln(x, self.linear2(both), gate, scale, shift)
