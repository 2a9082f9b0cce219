"""Launches and bytes of FLUX's blocks, counted on tensors without memory."""

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
import traffic
from flux_blocks import FLUX, DoubleBlock, SingleBlock
from torch.utils._python_dispatch import TorchDispatchMode

TEXT, IMAGE = 1241, 4096
TOTAL = TEXT + IMAGE
WIDTH = FLUX.width
STREAM = TOTAL * WIDTH * 2  # bytes of one row-wise tensor
MIB = 2**20

# What torch.compile made of diffusers' blocks at these sizes: launches of Triton kernels, MiB.
INDUCTOR = {"double": (15, 883), "single": (4, 568)}


class Calls(TorchDispatchMode):
    """Counts operators by name, and the copies and concatenations among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func).removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def ours(self) -> dict[str, int]:
        return {name[6:]: n for name, n in self.names.items() if name.startswith("redux.")}


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def angles(rows: int) -> list[torch.Tensor]:
    return [torch.empty(rows, FLUX.d // 2, device="meta") for _ in range(2)]


@pytest.fixture
def double() -> Calls:
    block = DoubleBlock(FLUX).to("meta", torch.bfloat16)
    with torch.no_grad(), Calls() as calls:
        block(*[empty(1, TEXT, WIDTH)] * 2, *[empty(1, IMAGE, WIDTH)] * 2, *angles(TOTAL),
              empty(1, 6 * WIDTH))  # fmt: skip
    return calls


@pytest.fixture
def single() -> Calls:
    block = SingleBlock(FLUX).to("meta", torch.bfloat16)
    with torch.no_grad(), Calls() as calls:
        block(*[empty(1, TOTAL, WIDTH)] * 2, *angles(TOTAL), empty(1, 3 * WIDTH))
    return calls


def test_double_block_moves_less_in_fewer_launches_than_the_compiler(double):
    assert double.ours == {"qk_norm_rope": 2, "gate_residual_adaln": 4, "gelu_into": 2}
    moved = 2 * traffic.gate_residual_adaln(TOTAL, WIDTH)
    moved += traffic.qk_norm_rope(TOTAL, FLUX.heads, FLUX.d) + traffic.gelu_into(TOTAL, 4 * WIDTH)
    launches, mib = INDUCTOR["double"]
    assert sum(double.ours.values()) == 8 < launches
    assert round(moved / MIB) == 691 < mib


def test_single_block_moves_less_in_fewer_launches_than_the_compiler(single):
    assert single.ours == {"qk_norm_rope": 1, "merge_groups": 1, "gelu_into": 1,
                           "gate_residual_adaln": 1}  # fmt: skip
    moved = traffic.gate_residual_adaln(TOTAL, WIDTH) + traffic.gelu_into(TOTAL, 4 * WIDTH)
    moved += traffic.qk_norm_rope(TOTAL, FLUX.heads, FLUX.d, copies_v=False)
    launches, mib = INDUCTOR["single"]
    assert sum(single.ours.values()) - 1 == 3 < launches  # but for the merge
    assert round(moved / MIB) == 503 < mib
    merge = traffic.merge_groups(TOTAL, FLUX.heads, FLUX.d)
    assert round(merge / MIB) == 94


@pytest.mark.parametrize("block", ["double", "single"])
def test_blocks_neither_copy_nor_concatenate(block, request):
    names = request.getfixturevalue(block).names
    moves = ("aten.cat", "aten.stack", "aten.clone", "aten.copy_", "aten._to_copy", "aten.add.")
    assert not [name for name in names if name.startswith(moves)]


def test_operators_move_what_their_tensors_hold():
    assert traffic.adaln(TOTAL, WIDTH) == 2 * STREAM
    assert traffic.gate_residual_adaln(TOTAL, WIDTH) == 4 * STREAM
    assert traffic.gelu_into(TOTAL, 4 * WIDTH) == 8 * STREAM
    scales = 4 * TOTAL
    assert traffic.adaln(TOTAL, WIDTH, quantized=True) == 3 * STREAM // 2 + scales
    assert traffic.gelu_quantize(TOTAL, 4 * WIDTH, WIDTH) == 15 * STREAM // 2 + scales
    assert traffic.quantize_rows(TOTAL, WIDTH) == 3 * STREAM // 2 + scales
    table = 2 * TOTAL * 64 * 4
    assert traffic.qk_norm_rope(TOTAL, 24, 128) == 6 * STREAM + table
    assert traffic.qk_norm_rope(TOTAL, 24, 128, copies_v=False) == 4 * STREAM + table
    lse = TOTAL * 24 * 4
    assert traffic.merge_groups(TOTAL, 24, 128) == 3 * STREAM + lse
    assert traffic.merge_groups(TOTAL, 24, 128, parts=4, keys=0) == 5 * STREAM + 4 * lse
    assert traffic.biased_attention(TOTAL, TOTAL, 24, 128) == 4 * STREAM + 4 * TOTAL


def test_every_function_is_an_operators():
    from redux_kernels.dispatch import REQUIRED_CAPABILITY

    names = {name for name, _ in inspect.getmembers(traffic, inspect.isfunction) if name[0] != "_"}
    folded = {name if name in names else name.removesuffix("_quantize")
              for name in REQUIRED_CAPABILITY}  # fmt: skip
    assert names == folded
