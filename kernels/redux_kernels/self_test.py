"""The start-up test: each kernel against its float32 reference, on the device that will run it.

What passes may run there; what does not keeps its reference, with the reason (``dispatch``). The
test also compiles the kernels for the model's sizes before the first request needs them. Each is
run twice, with other numbers, into memory that holds none of them: a kernel that does nothing, that
gives again what it gave before or that does not read an argument must not pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redux_kernels import (
    adaln,
    attention,
    checks,
    dispatch,
    gate_residual_adaln,
    gelu_into,
    gelu_quantize,
    group_norm_silu,
    merge_groups,
    qk_norm_rope,
    quantize_rows,
    reference,
)

ROWS = 67  # a tail in every tile
GROUPS = 8
REASON_LENGTH = 300


class Comparison(NamedTuple):
    """What a kernel gave, and the float32 numbers it should be within the tolerance of."""

    got: Tensor
    want: Tensor
    atol: float
    rtol: float


class Numbers(NamedTuple):
    """What a kernel is given beside tensors: no two rounds have one in common."""

    eps: float
    offset: int
    columns_before: int
    copies: float
    bias: float
    groups_halved: bool


ROUNDS = (Numbers(1e-6, 5, 1, 512.0, 0.5, False), Numbers(0.5, 9, 0, 3.0, -1.0, True))
ROOM = ROWS + 16  # rows of what is written to from an offset on


class Draw(NamedTuple):
    """Makes a test's tensors: the same ones every time, without touching torch's generators."""

    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator
    channel_groups: int = GROUPS
    numbers: Numbers = ROUNDS[0]

    @property
    def groups(self) -> int:
        """Of GroupNorms, in this round."""
        halved = self.numbers.groups_halved and self.channel_groups % 2 == 0
        return self.channel_groups // 2 if halved else self.channel_groups

    @property
    def width(self) -> int:
        """The hidden size."""
        return self.heads * self.head_dim

    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers in the test's dtype."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def rows(self, columns: int) -> Tensor:
        """One image's rows, which lie apart, so that strides are tested."""
        return self(1, ROWS, columns + 64)[..., :columns]

    def vectors(self, count: int) -> tuple[Tensor, ...]:
        """Modulation vectors out of one table."""
        return self(1, count * self.width).chunk(count, dim=-1)

    def attention(self) -> Tensor:
        """(1, heads, rows, d) whose rows come before its heads in memory."""
        return self(1, ROWS, self.heads, self.head_dim).transpose(1, 2)

    def written_to(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Twice the same rows to write into, the second in float32: what is left alone shows."""
        got = self(*shape)
        return got, got.float()

    def rounded(self, got: Tensor, want: Tensor) -> Comparison:
        """For numbers that are rounded once."""
        return Comparison(got, want, 2e-5, max(torch.finfo(self.dtype).eps, 2e-5))


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """Fill what kernels allocate: else it might still hold the numbers that are expected of them.

    torch fills new memory with NaN while its deterministic mode is on; launches are all that runs
    in here, and nothing else of that mode concerns them.
    """
    fill: Any = torch.utils.deterministic
    mode, is_filled = torch.get_deterministic_debug_mode(), fill.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    fill.fill_uninitialized_memory = True
    try:
        yield
    finally:
        fill.fill_uninitialized_memory = is_filled
        torch.set_deterministic_debug_mode(mode)


def _room(x: Tensor, width: int) -> checks.Quantized:
    with new_memory_is_nan():
        return checks.empty_quantized(x, width)


def _quantized(q: Tensor, row_scale: Tensor, want: Tensor) -> Iterator[Comparison]:
    """The rows' scales, and half a step of e4m3, with a little room for what comes before it.

    How large that step is must not be for the kernel to say.
    """
    want = want.flatten(0, 1)
    _, want_scale = reference.quantize_rows(want)
    yield Comparison(row_scale, want_scale, 0.0, 1e-3)
    atol = float(want_scale.max()) * 2**-9
    yield Comparison(q.float() * row_scale, want, atol, 1.01 * 2**-4)


def _test_adaln(draw: Draw) -> Iterator[Comparison]:
    x, (scale, shift), eps = draw.rows(draw.width), draw.vectors(2), draw.numbers.eps
    with new_memory_is_nan():
        h = adaln.launch(x, scale, shift, eps)
    yield draw.rounded(h, reference.adaln(x.float(), scale, shift, eps))


def _test_adaln_quantize(draw: Draw) -> Iterator[Comparison]:
    x, (scale, shift), eps = draw.rows(draw.width), draw.vectors(2), draw.numbers.eps
    room = _room(x, draw.width)
    adaln.launch(x, scale, shift, eps, *room)
    yield from _quantized(*room, reference.adaln(x.float(), scale, shift, eps))


def _test_gate_residual_adaln(draw: Draw) -> Iterator[Comparison]:
    x, y, (gate, scale, shift) = draw.rows(draw.width), draw.rows(draw.width), draw.vectors(3)
    eps = draw.numbers.eps
    with new_memory_is_nan():
        total, h = gate_residual_adaln.launch(x, y, gate, scale, shift, eps)
    yield draw.rounded(total, reference.gate_residual(x.float(), y, gate))
    yield draw.rounded(h, reference.adaln(total.float(), scale, shift, eps))


def _test_gate_residual_adaln_quantize(draw: Draw) -> Iterator[Comparison]:
    x, y, (gate, scale, shift) = draw.rows(draw.width), draw.rows(draw.width), draw.vectors(3)
    eps, room = draw.numbers.eps, _room(x, draw.width)
    with new_memory_is_nan():
        total, _ = gate_residual_adaln.launch(x, y, gate, scale, shift, eps, *room)
    yield draw.rounded(total, reference.gate_residual(x.float(), y, gate))
    yield from _quantized(*room, reference.adaln(total.float(), scale, shift, eps))


def _test_qk_norm_rope(draw: Draw) -> Iterator[Comparison]:
    qkv, offset, eps = draw.rows(3 * draw.width), draw.numbers.offset, draw.numbers.eps
    q_weight, k_weight = draw(2, draw.head_dim)
    angles = draw(ROWS, draw.head_dim // 2).float()
    cos, sin = angles.cos(), angles.sin()
    got, want = draw.written_to(3, 1, draw.heads, ROOM, draw.head_dim)
    q, k, v = got
    qk_norm_rope.launch(qkv, q_weight, k_weight, cos, sin, q, k, v, offset, eps)
    q, k, v = want
    reference.qk_norm_rope(qkv.float(), q_weight, k_weight, cos, sin, q, k, v, offset, eps)
    yield draw.rounded(got, want)


def _test_gelu_into(draw: Draw) -> Iterator[Comparison]:
    mlp, column = draw.rows(4 * draw.width), draw.width * draw.numbers.columns_before
    out, want = draw.written_to(1, ROWS, 5 * draw.width)
    gelu_into.launch(mlp, out, column)
    reference.gelu_into(mlp.float(), want, column)
    yield draw.rounded(out, want)


def _test_gelu_quantize(draw: Draw) -> Iterator[Comparison]:
    mlp, beside = draw.rows(4 * draw.width), draw.rows(draw.width)
    for part in (None, beside):
        h = reference.gelu(mlp)
        want = h if part is None else torch.cat((part.float(), h), dim=-1)
        room = _room(mlp, want.shape[-1])
        gelu_quantize.launch(mlp, part, *room)
        yield from _quantized(*room, want)


def _test_quantize_rows(draw: Draw) -> Iterator[Comparison]:
    x = draw.rows(draw.width)
    room = _room(x, draw.width)
    quantize_rows.launch(x, *room)
    yield from _quantized(*room, x.float())


def _test_merge_groups(draw: Draw) -> Iterator[Comparison]:
    """As few as a folded key and the rest, and as many as one call takes: both binaries."""
    bias, copies = draw.numbers.bias, draw.numbers.copies
    for parts, keys in ((1, 1), (2, 0), (merge_groups.MOST_PARTS, merge_groups.MOST_KEYS)):
        outs = [draw.attention() for _ in range(parts)]
        lses = [draw(1, draw.heads, ROWS).float() + 4 for _ in range(parts)]
        singles = [draw(2, 1, draw.heads, draw.head_dim).unbind() for _ in range(keys)]
        others = (
            *(lses, [bias + 0.3 * index for index in range(parts)], draw.attention()),
            *([key for key, _ in singles], [value for _, value in singles]),
            [math.log(copies)] * keys,
        )
        got, want = draw.written_to(1, draw.heads, ROWS, draw.head_dim)
        joint = draw(1, draw.heads, ROWS).float()
        want_joint = joint.clone()
        merge_groups.launch(outs, *others, got, joint)
        reference.merge_groups([each.float() for each in outs], *others, want, want_joint)
        yield draw.rounded(got, want)
        yield Comparison(joint, want_joint, 1e-5, 1e-5)


def _test_biased_attention(draw: Draw) -> Iterator[Comparison]:
    """Keys of several tiles and a tail, the first tile unseen; weights are rounded, unlike sums."""
    keys = 3 * ROWS
    q, k, v = draw(1, keys, 3, draw.heads, draw.head_dim).transpose(1, 3).unbind(2)
    q = q[:, :, -ROWS:]
    bias = torch.zeros(keys, device=draw.device)
    bias[:ROWS], bias[ROWS], bias[-9:] = -math.inf, math.log(draw.numbers.copies), -1.0
    got = draw.attention()
    attention.launch(q, k, v, bias, got)
    rounding = 2e-5 if draw.dtype == torch.float32 else 2 * torch.finfo(draw.dtype).eps
    yield Comparison(got, reference.biased_attention(q, k, v, bias), rounding, rounding)


def _test_group_norm_statistics(draw: Draw) -> Iterator[Comparison]:
    x = draw(2, ROWS, draw.head_dim) + 3
    want_mean, want_var = reference.group_norm_statistics(x, draw.groups)
    with new_memory_is_nan():
        mean, var = group_norm_silu.launch_statistics(x, draw.groups)
    yield Comparison(mean, want_mean, 1e-4, 1e-5)
    yield Comparison(var, want_var, 1e-4, 1e-4)


def _test_group_norm_silu(draw: Draw) -> Iterator[Comparison]:
    x, (weight, bias) = draw(2, ROWS, draw.head_dim), draw(2, draw.head_dim)
    mean, var = draw(2, 2, draw.channel_groups).float()
    var, eps = var.exp(), draw.numbers.eps
    with new_memory_is_nan():
        got = group_norm_silu.launch(x, mean, var, weight, bias, eps)
    yield draw.rounded(got, reference.group_norm_silu(x.float(), mean, var, weight, bias, eps))


TESTS: dict[str, Callable[[Draw], Iterator[Comparison]]] = {
    "adaln": _test_adaln,
    "adaln_quantize": _test_adaln_quantize,
    "gate_residual_adaln": _test_gate_residual_adaln,
    "gate_residual_adaln_quantize": _test_gate_residual_adaln_quantize,
    "qk_norm_rope": _test_qk_norm_rope,
    "gelu_into": _test_gelu_into,
    "gelu_quantize": _test_gelu_quantize,
    "quantize_rows": _test_quantize_rows,
    "merge_groups": _test_merge_groups,
    "biased_attention": _test_biased_attention,
    "group_norm_statistics": _test_group_norm_statistics,
    "group_norm_silu": _test_group_norm_silu,
}


def _verdict(operator: str, draw: Draw) -> str | None:
    """Why the kernel must not run, or None. Whatever goes wrong is a reason."""
    if reason := dispatch.hardware_refusal(operator, draw.device):
        return reason
    rounds = (draw._replace(numbers=numbers) for numbers in ROUNDS)
    try:
        for got, want, atol, rtol in chain.from_iterable(map(TESTS[operator], rounds)):
            error = (got.float() - want).abs()
            if not bool((error <= atol + rtol * want.abs()).all()):  # NaN is not <= anything
                return (
                    f"differs from its reference by up to {float(error.max()):.3g} "
                    f"(allowed: {atol:.3g} + {rtol:.3g} * |value|)"
                )
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:REASON_LENGTH]
    return None


@torch.no_grad()
def self_test(
    device: torch.device | str,
    *,
    heads: int = 24,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    groups: int = GROUPS,
    operators: Iterable[str] = (),
) -> dict[str, str | None]:
    """Let every kernel that agrees with its reference on ``device`` run there, and no other.

    Args:
        device: for example ``"cuda:0"``; on a CPU every kernel is refused.
        heads: the model's attention heads, for the sizes to test.
        head_dim: the size of a head, a power of two; of GroupNorms their channels, any number.
        dtype: the model's dtype.
        groups: those of GroupNorms; they divide ``head_dim``.
        operators: test these alone; all of them if none is named.

    Returns:
        For each operator None if its kernel will run, or the reason why its reference will.
    """
    device = torch.device(device)
    verdicts = {}
    for operator in operators or TESTS:
        draw = Draw(heads, head_dim, dtype, device, torch.Generator().manual_seed(0), groups)
        verdicts[operator] = _verdict(operator, draw)
        dispatch.record(operator, device, verdicts[operator])
    return verdicts
