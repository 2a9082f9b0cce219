"""What Inductor makes of a function: its kernels, other calls and bytes, read off generated code.

Works on fake tensors in a process that has called ``absent_gpu.install``. Nothing is run. Inductor
is imported where it is used: it still imports what torch deprecates. Knows no network.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import traffic

FLOAT64 = re.compile(r"\b(?:torch\.float64|tl\.float64|fp64)\b|\*fp64")


@dataclass(frozen=True)
class Code:
    """One generated program."""

    text: str
    launches: int
    """Triton kernels, Inductor's and ours, and copies by an attention that cannot do without."""
    size_bytes: int
    """What these kernels read and write."""
    calls: Mapping[str, int]
    """Everything else that is called, by name: matrix products, attention, copies."""

    @property
    def uses_float64(self) -> bool:
        """Whether any of it computes or stores in double precision."""
        return bool(FLOAT64.search(self.text))


class _Stop(Exception):
    """Ends a compilation once the code is written."""


def generate(function: Callable[..., Any], *args: Any) -> list[Code]:
    """Inductor's code for ``function(*args)``: one program for each graph that torch makes of it.

    What cannot be traced stands between graphs and is in none of them: only the numbers of a
    function that is one graph are whole.
    """
    from torch._inductor.compile_fx import compile_fx

    torch._dynamo.reset()
    codes: list[Code] = []

    def write(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        known = len(codes)
        try:
            compile_fx(graph, inputs)
        except Exception:
            if len(codes) == known:
                raise
        return graph.forward  # on fake tensors, for the graphs that follow

    with _captured(codes):
        torch.compile(function, backend=write)(*args)
    return codes


@contextmanager
def _captured(codes: list[Code]) -> Iterator[None]:
    """Within, generated programs are listed instead of loaded."""
    from torch._inductor.graph import GraphLowering

    def capture(graph: Any) -> None:
        written, _ = graph.codegen()
        codes.append(_read(written.value, graph))
        raise _Stop

    stock, GraphLowering._compile_to_module = GraphLowering._compile_to_module, capture
    try:
        yield
    finally:
        GraphLowering._compile_to_module = stock


def _read(text: str, graph: Any) -> Code:
    call = text[text.index("def call(") :]
    triton = re.findall(r"^\s+triton_\w+\.run\(", call, re.M)
    calls = Counter(re.findall(r"(?:extern_kernels|torch\.ops)\.([\w.]+?)(?:\.default)?\(", call))
    ours = {name: n for name, n in calls.items() if name.startswith(_COUNTED)}
    others = {name: n for name, n in calls.items() if name not in ours}
    size_bytes = _inductor_bytes(graph) + sum(_our_bytes(graph))
    return Code(text, len(triton) + sum(ours.values()), size_bytes, others)


def _inductor_bytes(graph: Any) -> int:
    _total, by_node, _times = graph.count_bytes()
    return sum(4 * words for node, words in by_node if not node.is_extern())


def _our_bytes(graph: Any) -> Iterator[int]:
    for node in graph.module.graph.nodes:
        operator = str(node.target).removesuffix(".default")
        if node.op == "call_function" and operator.startswith(_COUNTED):
            args = torch.fx.map_arg(node.args, lambda each: each.meta["val"])
            yield _OPERATORS[operator.partition(".")[2]](*args)


def _rows(x: torch.Tensor) -> int:
    return x.shape[0] * x.shape[1]


def _qk_norm_rope(qkv: Any, _qw: Any, _kw: Any, _cos: Any, _sin: Any, q: Any, _k: Any, v: Any,
                  *_: Any) -> int:  # fmt: skip
    return traffic.qk_norm_rope(_rows(qkv), q.shape[1], q.shape[3], copies_v=v is not None)


_COUNTED = ("redux.", "redux_tests.place")
_OPERATORS: dict[str, Callable[..., int]] = {
    "adaln": lambda x, *_: traffic.adaln(_rows(x), x.shape[-1]),
    "gate_residual_adaln": lambda x, *_: traffic.gate_residual_adaln(_rows(x), x.shape[-1]),
    "qk_norm_rope": _qk_norm_rope,
    "qk_norm_rope_": lambda qkv, weight, *_: traffic.qk_norm_rope(
        _rows(qkv), qkv.shape[-1] // 3 // weight.shape[0], weight.shape[0], copies_v=False
    ),
    "gelu_into": lambda mlp, *_: traffic.gelu_into(_rows(mlp), mlp.shape[-1]),
    "merge_groups": lambda outs, _lses, _biases, q, keys, *_: traffic.merge_groups(
        q.shape[0] * q.shape[2], q.shape[1], q.shape[3], parts=len(outs), keys=len(keys)
    ),
    "place": lambda out, _: 2 * out.numel() * out.element_size(),
}
"""Bytes that one call of our operators moves, from its arguments; in bfloat16."""
