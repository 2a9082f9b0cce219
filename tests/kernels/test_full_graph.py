"""The operators inside torch.compile: one graph for all sizes, and nothing copied around them."""

import re
import shutil
from collections.abc import Callable

import pytest
import torch
from flux_blocks import MINI, DoubleBlock, SingleBlock
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from redux_kernels.self_test import self_test

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SIZES = (64, 96, 117, 150, 256)
TEXT = 7
Inputs = Callable[[int], tuple[object, ...]]


def angles(rows: int) -> tuple[Tensor, Tensor]:
    table = torch.randn(rows, MINI.d // 2)
    return table.cos(), table.sin()


def for_double(rows: int) -> tuple[object, ...]:
    text, image = torch.randn(2, 1, TEXT, MINI.width), torch.randn(2, 1, rows, MINI.width)
    return (*text, *image, *angles(TEXT + rows), torch.randn(1, 6 * MINI.width))


def for_single(rows: int) -> tuple[object, ...]:
    x, h = torch.randn(2, 1, rows, MINI.width)
    return x, h, *angles(rows), torch.randn(1, 3 * MINI.width)


BLOCKS = [
    pytest.param(DoubleBlock, for_double, id="double"),
    pytest.param(SingleBlock, for_single, id="single"),
]


inductor = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
"""For tests that load Inductor, which still uses what torch deprecates."""


def mark_rows(inputs: tuple[object, ...]) -> None:
    """Say that the axis of the image's rows (and of the joint ones) may be of any size."""
    for each in inputs:
        if isinstance(each, Tensor) and each.shape[0] > 1:
            torch._dynamo.mark_dynamic(each, 0)
        elif isinstance(each, Tensor) and each.dim() == 3 and each.shape[1] != TEXT:
            torch._dynamo.mark_dynamic(each, 1)


def assert_compiles_once(block: nn.Module, inputs: Inputs, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    with torch.no_grad():
        for rows in SIZES:
            given = inputs(rows)
            mark_rows(given)
            for got, want in zip(compiled(*given), block(*given), strict=True):
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(("block", "inputs"), BLOCKS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_serves_all_sizes(block, inputs, backend):
    assert_compiles_once(block(MINI), inputs, backend)


@inductor
@pytest.mark.slow
@pytest.mark.parametrize(("block", "inputs"), BLOCKS)
def test_one_inductor_graph_serves_all_sizes(block, inputs):
    assert_compiles_once(block(MINI), inputs, "inductor")


@inductor
@pytest.mark.parametrize(("block", "inputs"), BLOCKS)
def test_inductor_passes_buffers_on_without_copies(block, inputs):
    """What writes into a buffer is traced as if it made a new one: the copy must go again."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    with torch.no_grad():
        compiled = torch.compile(block(MINI), fullgraph=True)
        _, (code,) = run_and_get_code(compiled, *inputs(64))
    call = code[code.index("def call(") :]
    assert "torch.ops.redux.qk_norm_rope" in call
    assert not re.findall(r"cpp_fused\w*|\.copy_\(|clone", call)


@inductor
@pytest.mark.gpu
@pytest.mark.parametrize(("block", "inputs"), BLOCKS)
def test_compiled_block_on_a_gpu_is_the_reference_on_a_cpu(block, inputs):
    self_test("cuda", heads=MINI.heads, head_dim=MINI.d, dtype=torch.float32)
    block = block(MINI)
    given = inputs(117)
    with torch.no_grad():
        wanted = block(*given)
        on_gpu = [each.cuda() if isinstance(each, Tensor) else each for each in given]
        results = torch.compile(block.cuda(), fullgraph=True)(*on_gpu)
    for got, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(got.cpu(), want, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("block", "inputs"), BLOCKS)
def test_block_can_be_captured_in_a_cuda_graph(block, inputs):
    self_test("cuda", heads=MINI.heads, head_dim=MINI.d, dtype=torch.float32)
    block = block(MINI).cuda()
    given = [each.cuda() if isinstance(each, Tensor) else each for each in inputs(117)]
    with torch.no_grad():
        wanted = block(*given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = block(*given)
        graph.replay()
    for got, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(got, want)
