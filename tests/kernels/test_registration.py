"""An operator of ours is one for torch's dispatcher and compiler, and loses nothing in silence."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from redux_kernels.registration import operator, overload_of, register_fake


@operator("redux_tests::scaled", mutates_args=())
def scaled(x: Tensor, by: float = 2.0) -> Tensor:
    """``x`` times ``by``."""
    return x * by


@register_fake(scaled)
def _(x: Tensor, by: float = 2.0) -> Tensor:
    return torch.empty_like(x)


@operator("redux_tests::scale_into", mutates_args=("out",))
def scale_into(x: Tensor, out: Tensor, other: Tensor | None = None) -> None:
    out.copy_(x if other is None else other * x)


@register_fake(scale_into)
def _(x: Tensor, out: Tensor, other: Tensor | None = None) -> None:
    pass


def test_operators_are_well_formed():
    torch.library.opcheck(overload_of(scaled), (torch.randn(3), 4.0))
    torch.library.opcheck(overload_of(scale_into), (torch.randn(3), torch.zeros(3)))


def test_schema_says_what_is_written_to():
    assert str(overload_of(scale_into)._schema) == (
        "redux_tests::scale_into(Tensor x, Tensor(a1!) out, Tensor? other=None) -> ()"
    )


def test_docstring_stays():
    assert scaled.__doc__ == "``x`` times ``by``."


class Seen(TorchDispatchMode):
    """The operators that are called within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_whoever_looks_on_sees_the_call():
    with torch.inference_mode(), Seen() as seen:
        scaled(torch.ones(3))
    assert "redux_tests.scaled.default" in seen.names


def test_where_nobody_looks_on_the_dispatcher_is_left_out(monkeypatch):
    """It would only find the function, and take six times as long."""
    overload = overload_of(scaled)
    monkeypatch.setattr(overload, "_op", lambda *_: pytest.fail("through the dispatcher"))
    with torch.inference_mode():
        assert torch.equal(scaled(torch.ones(3), by=3.0), torch.full((3,), 3.0))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_numbers_are_the_same_in_every_mode(mode):
    x = torch.randn(3)
    with mode():
        out = torch.zeros(3)
        scale_into(x, out=out)
        assert torch.equal(out, x)
        assert torch.equal(scaled(x, by=3.0), 3 * x)
        assert torch.equal(torch.ops.redux_tests.scaled(x), 2 * x)


def test_a_gradient_is_refused_where_it_would_be_lost():
    x = torch.randn(3, requires_grad=True)
    for call in (lambda: scaled(x), lambda: scale_into(torch.randn(3), torch.zeros(3), x)):
        with pytest.raises(RuntimeError, match=r"computes no gradients, .*inference_mode"):
            call()
    with torch.no_grad():
        assert not scaled(x).requires_grad


def test_a_change_is_told_to_those_who_kept_the_tensor():
    """Else their gradients would be wrong."""
    kept, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    loss = (kept * weight).sum()
    scale_into(torch.randn(3), kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_compiler_sees_one_graph_with_the_operators_in_it(mode):
    def run(x):
        out = torch.empty_like(x)
        scale_into(scaled(x), out)
        return out + 1

    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(5)
    with mode():
        got = torch.compile(run, backend=counter, fullgraph=True)(x)
    torch.testing.assert_close(got, 2 * x + 1)
    assert counter.frame_count == 1
    called = {str(node.target) for node in counter.graphs[0].graph.nodes}
    assert {"redux_tests.scaled.default", "redux_tests.scale_into.default"} <= called
