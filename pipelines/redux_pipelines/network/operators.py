"""What FLUX's blocks are made of: their linears with all that stands between two of them.

Each kind computes the same. ``TorchOperators`` is plain torch, in place wherever it can be, and
what every device falls back to; ``KernelOperators`` runs ``redux_kernels``, each of which replaces
several passes over a GPU's rows; ``onednn_operators`` has one for CPUs. ``operator_choice`` takes
the first that has proved itself. Knows no blocks.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from redux_kernels.adaln import adaln, adaln_quantize
from redux_kernels.checks import Quantized, empty_quantized
from redux_kernels.gate_residual_adaln import gate_residual_adaln, gate_residual_adaln_quantize
from redux_kernels.gelu_into import gelu_into
from redux_kernels.gelu_quantize import gelu_quantize
from redux_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_
from redux_kernels.quantize_rows import quantize_rows
from redux_pipelines.fp8.linear import ALL, Fp8Linear, Linear, project
from redux_pipelines.fp8.workspace import Workspace
from redux_pipelines.network.layers import Rope, gelu_, modulate, norm_rope, within_range_


class Residual(NamedTuple):
    """A residual stream ``x (B, n, H)`` to which ``gate · y`` is still to be added.

    ``y (B, n, H)`` and ``gate``, which is ``(H,)`` or for each image ``(B, 1, H)``, are None where
    nothing is. The addition waits for the norm that follows it, so that one pass does both, across
    the border of two blocks too.
    """

    x: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None

    def rows(self, first: int, end: int) -> "Residual":
        """Rows ``first`` up to ``end``."""
        y = None if self.y is None else self.y[:, first:end]
        return Residual(self.x[:, first:end], y, self.gate)


class SeparateHeads(NamedTuple):
    """Queries, keys and values ``(B, heads, S, D)``, in whatever order their rows and heads lie."""

    q: Tensor
    k: Tensor
    v: Tensor


class JointHeads(NamedTuple):
    """The same with queries and keys as one, ``qk (2, B, heads, S, D)``."""

    qk: Tensor
    v: Tensor

    @property
    def q(self) -> Tensor:
        """Queries."""
        return self.qk[0]

    @property
    def k(self) -> Tensor:
        """Keys."""
        return self.qk[1]


Heads = SeparateHeads | JointHeads


class SingleRows(NamedTuple):
    """A single block's rows between its ``single_in`` and its ``single_out``.

    The settled stream ``x (B, n, H)``, ``qkv (B, n, 3 H)``, and ``mlp``, what ``single_out`` wants
    of the MLP. ``qkv`` may be part of ``mlp``: values in it are changed only once ``attend`` is
    done.
    """

    x: Tensor
    qkv: Tensor
    mlp: Tensor


class Operators(Protocol):
    """One implementation of all of them.

    ``scale_offset`` is what the scales it is given have had added: 1 if it multiplies by them, 0 if
    it adds the 1 itself.
    """

    name: str
    scale_offset: float

    def for_run(self) -> "Operators":
        """These for one run over blocks, at the end of which goes what it kept between them."""
        ...

    def rotation(self, table: Rope) -> Rope:
        """``layers.rope_table`` in the form that ``place_heads`` reads, row by row."""
        ...

    def settle(self, stream: Residual) -> Tensor:
        """``x + gate · y``."""
        ...

    def normed_linear(
        self, stream: Residual, shift: Tensor, scale: Tensor, linear: Linear, rows: slice = ALL
    ) -> tuple[Tensor, Tensor]:
        """The settled stream ``(B, n, H)``, and ``linear`` of its modulated LayerNorm.

        ``shift`` and ``scale`` are ``(H,)`` or ``(B, 1, H)``; ``rows`` are those of the weight. The
        stream's ``x`` may be changed in place.
        """
        ...

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """``linear`` of ``x (B, n, in)`` as it is: nothing is fused."""
        ...

    def new_heads(self, x: Tensor, rows: int, num_heads: int, widths: int = 3) -> Heads:
        """Room for the heads of ``rows`` rows like those of ``x (B, n, H)``.

        Where rows lie together, the next one is ``widths`` times H away.
        """
        ...

    def place_heads(
        self, qkv: Tensor, weight: Tensor, rope: Rope, heads: Heads, first: int
    ) -> None:
        """RMSNorm and RoPE of ``qkv (B, n, 3 H)`` into rows of ``heads`` from ``first`` on.

        Values are copied. ``weight (2 D)`` are the norms' weights, of queries before keys; ``rope``
        are the rotations of these rows.
        """
        ...

    def single_heads(self, qkv: Tensor, weight: Tensor, rope: Rope, num_heads: int) -> Heads:
        """The heads of all rows ``qkv (B, S, 3 H)``, in new room or in theirs, values unchanged."""
        ...

    def normed_mlp(
        self, stream: Residual, shift: Tensor, scale: Tensor, up: Linear, down: Linear
    ) -> tuple[Tensor, Tensor]:
        """The settled stream, and ``down`` of GELU (tanh) of ``normed_linear`` by ``up``."""
        ...

    def single_in(
        self, stream: Residual, shift: Tensor, scale: Tensor, linear1: Linear, linear2: Linear
    ) -> SingleRows:
        """What a single block computes before its attention, by ``linear1`` of the normed rows."""
        ...

    def single_out(self, rows: SingleRows, attend: "Attend", linear2: Linear) -> Tensor:
        """``linear2`` of attention beside GELU of the MLP; changes what ``rows`` hold."""
        ...


Attend = Callable[[Tensor | None], Tensor]
"""Attention's output ``(B, n, H)``, written to a tensor if one is given; never over values."""


class _OneProjection:
    """``single_in`` of those that keep together what ``linear1`` gives, ``(B, n, 7 H)``."""

    def single_in(
        self: Operators,
        stream: Residual,
        shift: Tensor,
        scale: Tensor,
        linear1: Linear,
        linear2: Linear,
    ) -> SingleRows:
        """The rows keep all of ``linear1``'s output: ``linear2`` has to wait for attention."""
        x, up = self.normed_linear(stream, shift, scale, linear1)
        return SingleRows(x, up[..., : 3 * x.shape[-1]], up)


class TorchOperators(_OneProjection):
    """Plain torch: the streams are changed in place, and a norm's affine map is the modulation."""

    name = "torch"
    scale_offset = 1.0

    def for_run(self) -> "Operators":
        """The same: nothing is kept."""
        return self

    def rotation(self, table: Rope) -> Rope:
        """``table`` as it is."""
        return table

    def settle(self, stream: Residual) -> Tensor:
        """Added to the stream in place."""
        x, y, gate = stream
        if y is None or gate is None:
            return x
        return within_range_(x.addcmul_(gate, y))

    def normed_linear(
        self, stream: Residual, shift: Tensor, scale: Tensor, linear: Linear, rows: slice = ALL
    ) -> tuple[Tensor, Tensor]:
        """The norm's affine map is the modulation; then one product."""
        x = self.settle(stream)
        return x, project(linear, modulate(x, shift, scale), rows)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """One product."""
        return project(linear, x)

    def new_heads(self, x: Tensor, rows: int, num_heads: int, widths: int = 3) -> Heads:
        """Head by head, each with its rows: attention on a CPU is up to a tenth faster so."""
        shape = (len(x), num_heads, rows, x.shape[-1] // num_heads)
        return JointHeads(x.new_empty(2, *shape), x.new_empty(shape))

    def place_heads(
        self, qkv: Tensor, weight: Tensor, rope: Rope, heads: Heads, first: int
    ) -> None:
        """Norm and rotate queries and keys together; values are copied."""
        assert isinstance(heads, JointHeads)
        rows, (_, num_heads, _, width) = slice(first, first + qkv.shape[1]), heads.v.shape
        parts = qkv.view(*qkv.shape[:2], 3, num_heads, width)
        room = heads.qk[:, :, :, rows].permute(1, 3, 0, 2, 4)
        norm_rope(parts[:, :, :2], weight.view(2, 1, -1), rope, room)
        heads.v[:, :, rows] = parts[:, :, 2].transpose(1, 2)

    def single_heads(self, qkv: Tensor, weight: Tensor, rope: Rope, num_heads: int) -> Heads:
        """In new room."""
        heads = self.new_heads(qkv[..., : qkv.shape[-1] // 3], qkv.shape[1], num_heads)
        self.place_heads(qkv, weight, rope, heads, 0)
        return heads

    def normed_mlp(
        self, stream: Residual, shift: Tensor, scale: Tensor, up: Linear, down: Linear
    ) -> tuple[Tensor, Tensor]:
        """GELU in place, between two products."""
        x, rows = self.normed_linear(stream, shift, scale, up)
        return x, project(down, gelu_(rows))

    def single_out(self, rows: SingleRows, attend: Attend, linear2: Linear) -> Tensor:
        """Attention goes where the values were, beside the MLP."""
        up, width = rows.mlp, rows.x.shape[-1]
        up[..., 2 * width : 3 * width] = attend(None)
        gelu_(up[..., 3 * width :])
        return project(linear2, up.flatten(0, 1)[:, 2 * width :]).view(*up.shape[:2], -1)


class KernelOperators(_OneProjection):
    """``redux_kernels``: new rows instead of changed ones, each read and written once.

    Before a linear in fp8 they leave as e4m3, with a scale each; in a run all of these lie in the
    same memory.
    """

    name = "kernels"
    scale_offset = 0.0

    def __init__(self, workspace: Workspace | None = None) -> None:
        self._workspace = workspace

    def for_run(self) -> "Operators":
        """With memory for quantised rows, unless a compiler looks on: it plans memory itself."""
        return self if torch.compiler.is_compiling() else KernelOperators(Workspace())

    def rotation(self, table: Rope) -> Rope:
        """One angle per pair, ``(S, D/2)``."""
        return Rope(table.cos[:, 0, 0, ::2].contiguous(), table.sin[:, 0, 0, 1::2].contiguous())

    def settle(self, stream: Residual) -> Tensor:
        """A new tensor, by one pass of torch."""
        x, y, gate = stream
        return x if y is None or gate is None else torch.addcmul(x, gate, y)

    def normed_linear(
        self, stream: Residual, shift: Tensor, scale: Tensor, linear: Linear, rows: slice = ALL
    ) -> tuple[Tensor, Tensor]:
        """Residual, norm and modulation in one kernel, which quantises for a ``linear`` in fp8."""
        x, y, gate = stream
        scale, shift = _for_each(scale), _for_each(shift)
        if isinstance(linear, Fp8Linear):
            room = self._room(x, x.shape[-1])
            if y is None or gate is None:
                adaln_quantize(x, scale, shift, *room)
            else:
                x = gate_residual_adaln_quantize(x, y, _for_each(gate), scale, shift, *room)
            return x, _product(linear, room, x, rows)
        if y is None or gate is None:
            h = adaln(x, scale, shift)
        else:
            x, h = gate_residual_adaln(x, y, _for_each(gate), scale, shift)
        return x, project(linear, h, rows)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """Quantise by a kernel where ``linear`` is in fp8; one product."""
        if isinstance(linear, Fp8Linear):
            room = self._room(x, x.shape[-1])
            quantize_rows(x, *room)
            return _product(linear, room, x)
        return project(linear, x)

    def new_heads(self, x: Tensor, rows: int, num_heads: int, widths: int = 3) -> Heads:
        """Row by row, as flash attention reads them."""
        width = x.shape[-1] // num_heads
        room = x.new_empty(x.shape[0], rows, widths, num_heads, width)
        return SeparateHeads(*_by_heads(room[:, :, :3]))

    def place_heads(
        self, qkv: Tensor, weight: Tensor, rope: Rope, heads: Heads, first: int
    ) -> None:
        """Split, norm, rotate and place the heads in one kernel."""
        q_weight, k_weight = weight.chunk(2)
        q, k, v = heads.q, heads.k, heads.v
        qk_norm_rope(qkv, q_weight, k_weight, rope.cos, rope.sin, q, k, v, first)

    def single_heads(self, qkv: Tensor, weight: Tensor, rope: Rope, num_heads: int) -> Heads:
        """Where they are, by one kernel: a whole row is read before it is written to."""
        q_weight, k_weight = weight.chunk(2)
        qk_norm_rope_(qkv, q_weight, k_weight, rope.cos, rope.sin)
        return SeparateHeads(*_by_heads(qkv.view(*qkv.shape[:2], 3, num_heads, -1)))

    def normed_mlp(
        self, stream: Residual, shift: Tensor, scale: Tensor, up: Linear, down: Linear
    ) -> tuple[Tensor, Tensor]:
        """GELU in a kernel, which quantises where ``down`` is in fp8."""
        x, rows = self.normed_linear(stream, shift, scale, up)
        if isinstance(down, Fp8Linear):
            room = self._room(rows, rows.shape[-1])
            gelu_quantize(rows, None, *room)
            return x, _product(down, room, rows)
        activated = torch.empty_like(rows)
        gelu_into(rows, activated)
        return x, project(down, activated)

    def single_out(self, rows: SingleRows, attend: Attend, linear2: Linear) -> Tensor:
        """Attention and GELU are written beside each other, or quantised together for fp8."""
        up, width = rows.mlp, rows.x.shape[-1]
        if isinstance(linear2, Fp8Linear):
            attention, mlp = attend(None), up[..., 3 * width :]
            room = self._room(mlp, 5 * width)
            gelu_quantize(mlp, attention, *room)
            return _product(linear2, room, up)
        both = up.new_empty(*up.shape[:2], 5 * width)
        attend(both[..., :width])
        gelu_into(up[..., 3 * width :], both, width)
        return project(linear2, both)

    def _room(self, x: Tensor, width: int) -> Quantized:
        """For ``width`` columns of each row of ``x``, until the next time."""
        if self._workspace is None or torch.compiler.is_compiling():
            return empty_quantized(x, width)
        return self._workspace.room(x, width)


def _product(linear: Fp8Linear, rows: Quantized, like: Tensor, columns: slice = ALL) -> Tensor:
    """``linear`` of quantised rows, ``(B, n, out)`` in the dtype of ``like (B, n, …)``."""
    out = linear.forward_quantized(*rows, like.dtype, columns)
    return out.view(like.shape[0], like.shape[1], -1)


def _by_heads(parts: Tensor) -> tuple[Tensor, ...]:
    """``(B, S, 3, heads, D)`` as three of ``(B, heads, S, D)``."""
    return parts.permute(2, 0, 3, 1, 4).unbind(0)


def _for_each(vector: Tensor) -> Tensor:
    """``(H,)`` as it is, or ``(B, 1, H)`` as ``(B, H)``."""
    return vector if vector.dim() == 1 else vector.squeeze(1)
