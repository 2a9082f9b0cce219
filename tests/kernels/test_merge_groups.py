"""Attentions over groups of keys joined into one, against one attention with a bias per key."""

import math

import pytest
import torch
from kernel_cases import KERNEL_DEVICES, NAN, TOLERANCES, amid_canaries, attention, canaries_of

from redux_kernels import merge_groups as op
from redux_kernels import reference
from redux_kernels.merge_groups import MOST_KEYS, MOST_PARTS, merge_groups, plan_merge
from redux_kernels.registration import overload_of

COUNTS = [
    pytest.param(1, 1, id="folded-key"),
    pytest.param(2, 0, id="two-groups"),
    pytest.param(2, 1, id="two-groups-and-a-key"),
    pytest.param(3, 0, id="three-groups"),
    pytest.param(MOST_PARTS, MOST_KEYS, id="most"),
    pytest.param(1, MOST_KEYS, id="two-keys"),
]
SHAPES = [
    pytest.param(1, 2, 37, 128, id="flux-heads-with-a-tail"),
    pytest.param(2, 4, 5, 64, id="mini-heads"),
    pytest.param(1, 1, 1, 16, id="one-row"),
    pytest.param(1, 2, 0, 64, id="no-rows"),
]


def drawn(batch, heads, rows, d, parts, keys, *, dtype=torch.float32, device="cpu"):
    """Arguments up to the biases of keys, each amid canaries."""

    def heads_of(count, *shape, kind=dtype):
        return [amid_canaries(batch, heads, *shape, dtype=kind, device=device)
                for _ in range(count)]  # fmt: skip

    lses = [each.add_(4) for each in heads_of(parts, rows, kind=torch.float32)]
    (q,) = heads_of(1, rows, d)
    biases = [0.7 * index - 1 for index in range(parts)]
    singles = heads_of(keys, d), heads_of(keys, d)
    return heads_of(parts, rows, d), lses, biases, q, *singles, [math.log(512), -0.3][:keys]


def in_float(arguments):
    """Numbers as they are, and tensors in float32."""
    return [
        each.float() if isinstance(each, torch.Tensor)
        else [one.float() if isinstance(one, torch.Tensor) else one for one in each]
        for each in arguments
    ]  # fmt: skip


CASES = [
    *(pytest.param(*counts.values, *SHAPES[1].values, id=counts.id) for counts in COUNTS),
    *(pytest.param(2, 1, *shape.values, id=shape.id) for shape in SHAPES),
    pytest.param(MOST_PARTS, MOST_KEYS, *SHAPES[0].values, id="most-with-a-tail"),
]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize(("parts", "keys", "batch", "heads", "rows", "d"), CASES)
def test_kernel_is_its_reference(
    parts, keys, batch, heads, rows, d, dtype, atol, rtol, device
):  # fmt: skip
    given = drawn(batch, heads, rows, d, parts, keys, dtype=dtype, device=device)
    into = amid_canaries(batch, heads, rows, d, dtype=dtype, device=device).fill_(NAN)
    lse = torch.empty(batch, heads, rows, device=device)
    op.launch(*given, into, lse)
    want, want_lse = torch.empty(into.shape, device=device), torch.empty_like(lse)
    reference.merge_groups(*in_float(given), want, want_lse)
    torch.testing.assert_close(into.float(), want, atol=max(atol, 2e-6), rtol=rtol)
    torch.testing.assert_close(lse, want_lse, atol=1e-6, rtol=1e-6)
    assert canaries_of(into).isnan().all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_writes_into_columns_of_a_wider_buffer_and_no_lse_unless_asked(device):
    given = drawn(1, 4, 9, 64, 2, 1, device=device)
    wide = torch.full((1, 9, 512), NAN, device=device)
    into = wide[..., 128:384].unflatten(-1, (4, 64)).transpose(1, 2)
    before = [each.clone() for each in given[1]]
    op.launch(*given, into, None)
    want = torch.empty(1, 4, 9, 64, device=device)
    reference.merge_groups(*given, want)
    torch.testing.assert_close(into, want, atol=2e-6, rtol=1e-5)
    assert wide[..., :128].isnan().all()
    assert wide[..., 384:].isnan().all()
    assert all(map(torch.equal, before, given[1]))


def both(device):
    """The kernel and its reference."""
    return (op.launch, reference.merge_groups)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("which", [0, 1], ids=["kernel", "reference"])
def test_rows_without_keys_in_a_group_are_left_out(which, device):
    """Four rows: keys in both groups, in the first only, in the second only, in none."""
    a, b, q = torch.randn(3, 1, 1, 4, 16, device=device)
    lse_a = torch.tensor([[[1.0, 2.0, -math.inf, -math.inf]]], device=device)
    lse_b = torch.tensor([[[1.0, -math.inf, 2.0, -math.inf]]], device=device)
    into, lse = torch.empty_like(a), torch.empty_like(lse_a)
    both(device)[which]([a, b], [lse_a, lse_b], [0.0, 0.0], q, [], [], [], into, lse)
    torch.testing.assert_close(into[0, 0, 0], (a[0, 0, 0] + b[0, 0, 0]) / 2)
    torch.testing.assert_close(into[0, 0, 1:], torch.stack([a[0, 0, 1], b[0, 0, 2], a[0, 0, 3]]))
    wanted = [1 + math.log(2), 2.0, 2.0, -math.inf]
    torch.testing.assert_close(lse, torch.tensor([[wanted]], device=device))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("which", [0, 1], ids=["kernel", "reference"])
def test_groups_and_keys_of_weight_zero_are_left_out(which, device):
    outs, lses, _, q, keys, values, _ = drawn(1, 2, 9, 64, 3, 2, device=device)
    none, into = -math.inf, torch.empty(1, 2, 9, 64, device=device)
    rest = q, keys, values, [none, none], into, None
    both(device)[which](outs, lses, [none, 0.3, none], *rest)
    torch.testing.assert_close(into, outs[1], atol=0, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(11, 1), (5, 6, 1), (3, 2, 4, 5, 1), (2, 2, 2, 2, 2, 1, 1)])
def test_reference_is_one_attention_with_a_bias_per_key(sizes):
    """Groups of several keys, and single ones at the end."""
    q, k, v = torch.randn(3, 2, 3, sum(sizes), 16, dtype=torch.float64)
    biases = [math.log(0.3 + index) for index in range(len(sizes))]
    bias = torch.cat([torch.full((n,), b).double() for n, b in zip(sizes, biases, strict=True)])
    want, want_lse = attention(q, k, v, bias)
    pairs = list(zip(k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True))
    count = sum(size > 1 for size in sizes)
    parts = [attention(q, *pair) for pair in pairs[:count]]
    outs, lses = ([each[i].float() for each in parts] for i in range(2))
    singles = ([pair[i][:, :, 0].float() for pair in pairs[count:]] for i in range(2))
    into, lse = torch.empty(q.shape), torch.empty(q.shape[:3])
    ends = biases[:count], q.float(), *singles, biases[count:]
    merge_groups(outs, lses, *ends, into, lse)
    torch.testing.assert_close(into, want.float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("parts", "keys"), [(1, 1), (3, 0)])
@pytest.mark.parametrize("with_lse", [False, True])
def test_operator_is_well_formed(parts, keys, with_lse):
    given = drawn(2, 4, 5, 64, parts, keys, dtype=torch.bfloat16)
    into = torch.zeros(2, 4, 5, 64, dtype=torch.bfloat16)
    lse = torch.zeros(2, 4, 5) if with_lse else None
    torch.library.opcheck(overload_of(merge_groups), (*given, into, lse))


def zeros(*shape, **options):
    return torch.zeros(2, 4, *shape, **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"outs": [zeros(6, 64), zeros(5, 64)]}, r"outs must be like into = \(2, 4, 5, 64\)"),
        ({"outs": []}, r"outs, .* must be 1 to 5, .* got \[0, 2, 2\]"),
        ({"biases": [0.0]}, r"outs, .* and as many: got \[2, 2, 1\]"),
        ({"outs": [zeros(5, 64)] * 6, "lses": [zeros(5)] * 6, "biases": [0.0] * 6}, r"\[6, 6, 6\]"),
        ({"keys": [zeros(64)] * 3}, r"keys, .* must be 0 to 2, .* got \[3, 1, 1\]"),
        ({"biases": [0.0, math.nan]}, r"biases must be numbers below infinity, got \[0.0, nan\]"),
        ({"key_biases": [math.inf]}, "key_biases must be numbers below infinity"),
        ({"keys": [zeros(1, 64)]}, r"keys must be \(batch, heads, d\) = \(2, 4, 64\)"),
        ({"lses": [zeros(5).bfloat16(), zeros(5)]}, "lses must be torch.float32"),
        ({"lses": [torch.zeros(2, 5, 4).mT, zeros(5)]}, "lses must be contiguous"),
        ({"outs": [zeros(5, 64), torch.zeros(2, 5, 4, 64).transpose(1, 2)]},
         "all outs must be laid out alike"),
        ({"q": zeros(6, 64)}, "q must be like into"),
        ({"into": zeros(5, 48), "q": zeros(5, 48)}, "into must have a head size in"),
        ({"into": zeros(5, 64, dtype=torch.float16)}, "outs must be torch.float16"),
        ({"joint_lse": torch.zeros(5, 4, 2).permute(2, 1, 0)}, "joint_lse must be contiguous"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_by_name(wrong, message):
    right = {
        "outs": [zeros(5, 64), zeros(5, 64)],
        "lses": [zeros(5), zeros(5)],
        "biases": [0.0, 0.0],
        "q": zeros(5, 64),
        "keys": [zeros(64)],
        "values": [zeros(64)],
        "key_biases": [0.0],
        "into": zeros(5, 64),
        "joint_lse": None,
    }
    merge_groups(**right)
    with pytest.raises(ValueError, match=message):
        merge_groups(**right | wrong)


def test_two_binaries_serve_all_counts():
    assert plan_merge(1, 24, 5337, 128, 1, 1) == (32, 4, (167, 24, 1), 2, 1)
    slots = {
        plan_merge(1, 1, 1, 128, parts, keys)[3:]
        for parts in range(1, MOST_PARTS + 1)
        for keys in range(MOST_KEYS + 1)
    }
    assert slots == {(2, 1), (MOST_PARTS, MOST_KEYS)}
