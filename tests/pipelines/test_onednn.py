"""oneDNN's products are plain torch's, and are left alone wherever that has not been seen."""

import platform

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from redux_pipelines import onednn

CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", [(5, 48), (2, 7, 48), (1, 1, 48)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(shape, has_bias):
    x, weight, bias = draw(*shape), draw(80, 48, seed=1), draw(80, seed=2) if has_bias else None
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert off(onednn.linear(x, weight, bias), wanted) <= 1e-6


@pytest.mark.parametrize("weight", [draw(80, 48), draw(48, 80).t(), draw(80, 64)[:, 16:]])
def test_add_linear(weight):
    x, other = draw(2, 7, 48, seed=1), draw(2, 7, 80, seed=2)
    before = other.clone()
    wanted = other.double() + F.linear(x.double(), weight.double())
    assert off(onednn.add_linear(x, weight, other), wanted) <= 1e-6
    assert torch.equal(other, before)


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 23])
@pytest.mark.parametrize("batch", [1, 3])
def test_mlp_by_some_rows_at_a_time(rows, batch, monkeypatch):
    monkeypatch.setattr(onednn, "_ROWS_AT_ONCE", 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x, up, down = draw(batch, rows + 2, 48)[:, 2:], draw(96, 48, seed=1), draw(80, 128, seed=2)
    down, up_bias, down_bias = down[:, 32:], draw(96, seed=3), draw(80, seed=4)
    middle = F.gelu(F.linear(x.double(), up.double(), up_bias.double()), approximate="tanh")
    wanted = F.linear(middle, down.double(), down_bias.double())
    got = onednn.mlp(x, up, up_bias, down, down_bias)
    assert got.shape == wanted.shape
    assert off(got, wanted) <= 1e-6


def test_the_middle_of_an_mlp_is_never_there_whole(monkeypatch):
    monkeypatch.setattr(onednn, "_ROWS_AT_ONCE", 64)
    shapes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                shapes.append(tuple(out.shape))
            return out

    at_once = 64 * torch.get_num_threads()
    given = draw(5 * at_once, 16), draw(48, 16), draw(48), draw(16, 48), draw(16)
    with Watch():
        onednn.mlp(*given)
    assert {shape[0] for shape in shapes if shape[1:] == (48,)} == {at_once}


def test_operators_for_compiled_code_keep_their_promises():
    x, up, down, other = draw(2, 7, 48), draw(96, 48), draw(80, 128)[:, 32:], draw(2, 7, 80)
    torch.library.opcheck(onednn._linear_operator, (x, up, draw(96)))
    torch.library.opcheck(onednn._linear_operator, (x, up, None))
    torch.library.opcheck(onednn._add_linear_operator, (x, draw(80, 48), other))
    torch.library.opcheck(onednn._mlp_operator, (x, up, draw(96), down, draw(80)))


def test_compiled_code_calls_those_operators():
    """Inductor must not meet torch's own, whose weights it expects to be constants."""
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x, up, down = draw(2, 7, 48), draw(192, 48), draw(48, 192)

    def everything(x):
        y = onednn.mlp(onednn.linear(x, up[:48]), up, up[:, 0], down, down[:, 0])
        return onednn.add_linear(x, up[:48], y)

    compiled = torch.compile(everything, fullgraph=True, backend=backend, dynamic=True)
    assert torch.equal(compiled(x), everything(x))
    names = ("onednn_linear", "onednn_mlp", "onednn_add_linear")
    assert all(any(name in each for each in seen) for name in names)
    assert not any("mkldnn" in each for each in seen)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cuda", torch.float32, "runs on cpu, not on cuda"),
        ("cpu", torch.bfloat16, "does not take bfloat16"),
        ("cpu", torch.float64, "does not take float64"),
    ],
)
def test_where_it_is_not_used(device, dtype, reason):
    assert onednn.refusal(torch.device(device), dtype) == reason


def test_it_is_used_where_it_was_measured(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    assert onednn.refusal(CPU, torch.float32) is None
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert onednn.refusal(CPU, torch.float32) == "is measured on x86-64 only, not on arm64"


@pytest.mark.parametrize("name", ["product", "add_product"])
def test_what_is_wrong_is_refused(name, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    own = getattr(onednn, name)
    monkeypatch.setattr(onednn, name, lambda *given, **named: own(*given, **named) * 1.001)
    assert "is wrong: relative error" in onednn.refusal(CPU, torch.float32)
    monkeypatch.setattr(onednn, name, lambda *given, **named: own(*given, **named) * torch.nan)
    assert (
        onednn.refusal(CPU, torch.float32) == "is wrong: relative error nan, at most 1e-05 allowed"
    )


def test_what_is_missing_is_refused(monkeypatch):
    def fail(*_given, **_named):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute\nsecond line")

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(onednn, "product", fail)
    expected = "failed: '_OpNamespace' 'mkldnn' object has no attribute"
    assert onednn.refusal(CPU, torch.float32) == expected


@pytest.mark.parametrize("processor", ["Intel64 Family 6, GenuineIntel", "AMD64 Family 25"])
def test_where_no_file_tells_the_processor_the_system_does(processor, monkeypatch, tmp_path):
    monkeypatch.setattr(onednn, "_CPU_INFO", tmp_path / "absent")
    monkeypatch.setattr("platform.processor", lambda: processor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert onednn.loses_to_mkl(3072) is ("Intel" in processor)
    assert not onednn.loses_to_mkl(256)
