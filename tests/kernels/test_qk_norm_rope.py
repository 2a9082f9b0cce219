"""q, k and v on their way to attention, against torch in float64 and against the reference."""

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from kernel_cases import KERNEL_DEVICES, NAN, TOLERANCES, amid_canaries, canaries_of
from torch import Tensor

from redux_kernels import qk_norm_rope as op
from redux_kernels import reference
from redux_kernels.qk_norm_rope import heads_of, plan_heads, qk_norm_rope, qk_norm_rope_
from redux_kernels.registration import overload_of

SHAPES = [
    pytest.param(1, 3, 24, 128, id="flux"),
    pytest.param(2, 5, 4, 64, id="mini"),
    pytest.param(2, 2, 3, 16, id="odd-heads"),
    pytest.param(1, 0, 4, 64, id="no-rows"),
]


class Inputs(NamedTuple):
    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    cos: Tensor
    sin: Tensor

    def in_float32(self) -> "Inputs":
        return Inputs(*(each.float() for each in self))


def inputs(batch, rows, heads, d, dtype, device="cpu") -> Inputs:
    qkv = amid_canaries(batch, rows, 3 * heads * d, dtype=dtype, device=device)
    angles = 10 * torch.randn(rows, d // 2, device=device)
    weights = 1 + 0.1 * torch.randn(2, d, device=device)
    return Inputs(qkv, *weights.to(dtype), angles.cos(), angles.sin())


def buffers(batch, total, heads, d, dtype, device="cpu", rows_first=False):
    """q, k, v, all NaN; rows before heads in memory, as some attentions want them, or after."""
    shape = (3, batch, total, heads, d) if rows_first else (3, batch, heads, total, d)
    both = torch.full(shape, NAN, dtype=dtype, device=device)
    return list(both.transpose(2, 3) if rows_first else both)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("rows_first", [False, True], ids=["heads-first", "rows-first"])
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize(("batch", "rows", "heads", "d"), SHAPES)
def test_kernel_is_its_reference(batch, rows, heads, d, dtype, atol, rtol, rows_first, device):
    given = inputs(batch, rows, heads, d, dtype, device)
    got = buffers(batch, rows + 3, heads, d, dtype, device, rows_first)
    op.launch(*given, *got, 2, 1e-6)
    want = buffers(batch, rows + 3, heads, d, torch.float32, device)
    reference.qk_norm_rope(*given.in_float32(), *want, 2)
    for mine, theirs in zip(got, want, strict=True):
        assert mine[:, :, :2].isnan().all()
        assert mine[:, :, rows + 2 :].isnan().all()
        torch.testing.assert_close(mine.float(), theirs, atol=atol, rtol=rtol, equal_nan=True)


def watched_in_place():
    """In the interpreter, which needs triton to be watched."""
    import interpreter_memory

    return interpreter_memory.in_place()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("batch", "rows", "heads", "d"), SHAPES)
def test_kernel_may_write_to_where_it_reads(batch, rows, heads, d, device):
    """Bit for bit what it writes elsewhere, and no more than queries and keys."""
    given = inputs(batch, rows, heads, d, torch.bfloat16, device)
    q, k, _ = buffers(batch, rows, heads, d, torch.bfloat16, device)
    op.launch(*given, q, k, None, 0, 1e-6)
    width, canaries = heads * d, canaries_of(given.qkv)
    values = given.qkv[..., 2 * width :].clone()
    own_q, own_k, _ = heads_of(given.qkv, given.q_weight)
    with watched_in_place() if device == "cpu" else nullcontext():
        op.launch(*given, own_q, own_k, None, 0, 1e-6)
    assert torch.equal(own_q, q)
    assert torch.equal(own_k, k)
    assert torch.equal(given.qkv[..., 2 * width :], values)
    assert torch.equal(canaries_of(given.qkv).isnan(), canaries.isnan())


def test_operator_in_place_is_the_other_one():
    given = inputs(2, 5, 3, 16, torch.float32)
    want = buffers(2, 5, 3, 16, torch.float32)
    qk_norm_rope(*given, *want)
    qk_norm_rope_(*given)
    for got, each in zip(heads_of(given.qkv, given.q_weight), want, strict=True):
        assert torch.equal(got, each)


def test_operator_in_place_is_well_formed():
    up, *rest = inputs(2, 5, 4, 64, torch.bfloat16)
    torch.library.opcheck(overload_of(qk_norm_rope_), (up.contiguous(), *rest))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qkv": torch.zeros(2, 5, 100)}, r"qkv must be \(batch, rows, 3 heads d\)"),
        ({"q_weight": torch.zeros(1, 64)}, r"with q_weight \(d,\), got .* and \(1, 64\)"),
        ({"k_weight": torch.zeros(32)}, r"k_weight must be \(d,\) = \(64,\)"),
        ({"cos": torch.zeros(4, 32)}, r"cos must be \(rows, d / 2\)"),
    ],
)
def test_wrong_tensors_in_place_are_refused_by_name(wrong, message):
    right = {
        "qkv": torch.zeros(2, 5, 3 * 128),
        **{name: torch.zeros(64) for name in ("q_weight", "k_weight")},
        **{name: torch.zeros(5, 32) for name in ("cos", "sin")},
    }
    with pytest.raises(ValueError, match=message):
        qk_norm_rope_(**right | wrong)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_leaves_v_where_it_is_if_asked(device):
    given = inputs(1, 3, 4, 64, torch.bfloat16, device)
    with_v, without = (buffers(1, 3, 4, 64, torch.bfloat16, device) for _ in range(2))
    op.launch(*given, *with_v, 0, 1e-6)
    op.launch(*given, *without[:2], None, 0, 1e-6)
    assert torch.equal(without[0], with_v[0])
    assert torch.equal(without[1], with_v[1])
    assert without[2].isnan().all()
    v = given.qkv[..., 512:].unflatten(-1, (4, 64)).transpose(1, 2)
    assert torch.equal(v, with_v[2])


def test_reference_rotates_pairs_as_complex_numbers():
    given = inputs(2, 5, 4, 64, torch.float32)
    q, k, v = buffers(2, 5, 4, 64, torch.float32)
    qk_norm_rope(*given, q, k, v)
    parts = given.qkv.double().unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)
    turn = torch.complex(given.cos.double(), given.sin.double())
    for part, weight, got in zip(parts, (given.q_weight, given.k_weight), (q, k), strict=False):
        norm = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        turned = torch.view_as_complex(norm.unflatten(-1, (-1, 2))) * turn
        want = torch.view_as_real(turned).flatten(-2).float()
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    assert torch.equal(v.double(), parts[2])


def test_two_streams_fill_one_buffer():
    text, image = inputs(1, 3, 4, 64, torch.bfloat16), inputs(1, 5, 4, 64, torch.bfloat16)
    joint = buffers(1, 8, 4, 64, torch.bfloat16)
    qk_norm_rope(*text, *joint, row_offset=0)
    qk_norm_rope(*image, *joint, row_offset=3)
    alone = buffers(1, 5, 4, 64, torch.bfloat16)
    qk_norm_rope(*image, *alone)
    for both, one in zip(joint, alone, strict=True):
        assert not both.isnan().any()
        assert torch.equal(both[:, :, 3:], one)


@pytest.mark.parametrize("with_v", [True, False])
def test_operator_is_well_formed(with_v):
    qkv, *rest = inputs(2, 5, 4, 64, torch.bfloat16)
    q, k, v = (torch.zeros(2, 4, 9, 64, dtype=torch.bfloat16) for _ in range(3))
    torch.library.opcheck(
        overload_of(qk_norm_rope),
        (qkv.contiguous(), *rest, q, k, v if with_v else None),
        {"row_offset": 4},
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"row_offset": 5}, "rows 5 to 10 do not fit into 9 rows of q"),
        ({"row_offset": -1}, "rows -1 to 4 do not fit"),
        ({"qkv": torch.zeros(2, 5, 512)}, r"qkv must be .* = \(2, 5, 768\)"),
        ({"cos": torch.zeros(5, 32, dtype=torch.float64)}, "cos must be torch.float32"),
        ({"sin": torch.zeros(4, 32)}, r"sin must be \(rows, d / 2\) = \(5, 32\)"),
        ({"sin": torch.zeros(5, 64)[:, :32]}, "cos and sin must have the same strides"),
        ({"k": torch.zeros(2, 4, 8, 64)}, "k must be like q"),
        ({"v": torch.zeros(2, 4, 9, 64, dtype=torch.bfloat16)}, "v must be torch.float32"),
        ({"q": torch.zeros(2, 4, 64, 9).transpose(2, 3)}, "q must be contiguous"),
        ({"q": torch.zeros(2, 4, 9, 48)}, "q must have a head size in"),
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong, message):
    right = {
        "qkv": torch.zeros(2, 5, 768),
        **{name: torch.zeros(64) for name in ("q_weight", "k_weight")},
        **{name: torch.zeros(5, 32) for name in ("cos", "sin")},
        **{name: torch.zeros(2, 4, 9, 64) for name in ("q", "k", "v")},
    }
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**right | wrong)


def test_plan_reads_an_angle_once_for_all_heads():
    assert plan_heads(1, 5337, 24, 128) == (8, 4, (5337, 1))
    assert plan_heads(2, 300, 4, 64) == (4, 1, (300, 2))
